"""Eq. 3 on logits and on hidden states, the learning rate, the optimizers' groups, and perplexity."""

import math
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill import (Config, compiled_eq3_rows, dense_distillation_loss, distillation_loss, learning_rate,
                     make_optimizers, perplexities)
from model import GPT, GPTConfig

IGNORED = -100


def eq3(student_logits, teacher_logits, targets, gamma, T, direction, vocab_size, num_tokens):
    """Eq. 3 in plain loops over Python numbers, as the paper writes it → (loss, ce, kl)."""
    ce = kl = 0.0
    for z_S, z_T, target in zip(student_logits.tolist(), teacher_logits.tolist(), targets.tolist()):
        if target == IGNORED:
            continue
        ce += math.log(sum(math.exp(z) for z in z_S)) - z_S[target]
        p, q = ([math.exp(z / T) for z in logits[:vocab_size]] for logits in (z_T, z_S))
        p, q = [weight / sum(p) for weight in p], [weight / sum(q) for weight in q]
        if direction == "reverse":
            p, q = q, p
        kl += sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q))
    return (ce + gamma * kl) / num_tokens, ce / num_tokens, kl / num_tokens


def example(rows=(13, 13), shape=(2, 5), ignored="some", dtype=torch.float64, seed=0):
    """Random student_hidden, student_head, teacher_hidden, teacher_head, targets; `rows` of the two heads."""
    generator = torch.Generator().manual_seed(seed)
    student_hidden, student_head, teacher_hidden, teacher_head = (
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        for size in ((*shape, 4), (rows[0], 4), (*shape, 6), (rows[1], 6)))
    targets = torch.randint(min(rows), shape, generator=generator)
    if ignored == "some":
        targets.view(-1)[1::3] = IGNORED
    elif ignored == "all":
        targets[:] = IGNORED
    return student_hidden.requires_grad_(), student_head.requires_grad_(), teacher_hidden, teacher_head, targets


def on_logits(student_hidden, student_head, teacher_hidden, teacher_head, targets, **settings):
    """dense_distillation_loss under distillation_loss's signature: the oracle."""
    settings.pop("chunk_size", None)
    teacher_logits = None if teacher_hidden is None else F.linear(teacher_hidden, teacher_head)
    return dense_distillation_loss(F.linear(student_hidden, student_head), teacher_logits, targets, **settings)


def with_gradients(loss_fn, inputs, **settings):
    """loss, ce, kl and the gradients of student_hidden and student_head."""
    losses = loss_fn(*inputs, **settings)
    return [loss.detach() for loss in losses] + list(torch.autograd.grad(losses[0], inputs[:2]))


def assert_equal(results, expected, tolerance):
    """Equal within `tolerance` of each tensor's largest value."""
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape and result.dtype == wanted.dtype
        scale = max(1e-3, wanted.abs().max().item())
        torch.testing.assert_close(result, wanted, rtol=0, atol=tolerance * scale)


def assert_is_dense(inputs, **settings):
    tolerance = 1e-10 if inputs[0].dtype == torch.float64 else 1e-5
    assert_equal(with_gradients(distillation_loss, inputs, **settings), with_gradients(on_logits, inputs, **settings),
                 tolerance)


# ----------------------------------------------- Eq. 3 on logits ---------------------------------------------------


def two_tokens():
    """Two tokens over two ids. Student (1/2, 1/2) and (3/4, 1/4), teacher (3/4, 1/4) twice; targets 0 and 1."""
    student = torch.tensor([[1 / 2, 1 / 2], [3 / 4, 1 / 4]], dtype=torch.float64).log()
    teacher = torch.tensor([[3 / 4, 1 / 4], [3 / 4, 1 / 4]], dtype=torch.float64).log()
    return student, teacher, torch.tensor([0, 1])


@pytest.mark.parametrize("direction, kl", [
    ("forward", 0.0654060180),  # (3/4 ln 3/2 + 1/4 ln 1/2 + 0) / 2
    ("reverse", 0.0719205181),  # (1/2 ln 2/3 + 1/2 ln 2 + 0) / 2
])
def test_two_tokens_by_hand(direction, kl):
    ce = 1.0397207708  # (ln 2 + ln 4) / 2
    losses = dense_distillation_loss(*two_tokens(), gamma=0.2, direction=direction)
    assert [loss.item() for loss in losses] == pytest.approx([ce + 0.2 * kl, ce, kl], abs=1e-10)
    # The same logits as hidden states, behind a head that is the identity
    student, teacher, targets = two_tokens()
    eye = torch.eye(2, dtype=torch.float64)
    losses = distillation_loss(student, eye, teacher, eye, targets, gamma=0.2, direction=direction)
    assert [loss.item() for loss in losses] == pytest.approx([ce + 0.2 * kl, ce, kl], abs=1e-10)


def test_defaults_are_the_papers():
    losses, explicit = (loss_fn(*example(), **settings) for loss_fn, settings in (
        (distillation_loss, {}), (on_logits, dict(gamma=0.2, temperature=1.0, direction="forward"))))
    assert_equal(losses, explicit, 1e-10)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("rows, vocab_size", [((13, 13), None), ((13, 17), None), ((17, 13), None), ((17, 15), 13)])
@pytest.mark.parametrize("num_tokens", [None, 11])
def test_both_losses_are_eq_3(T, direction, rows, vocab_size, num_tokens):
    inputs = example(rows)
    logits = [F.linear(inputs[0], inputs[1]).flatten(0, 1), F.linear(inputs[2], inputs[3]).flatten(0, 1)]
    targets = inputs[4].flatten()
    expected = eq3(*logits, targets, 0.3, T, direction, 13, num_tokens or (targets != IGNORED).sum().item())
    for loss_fn in (on_logits, distillation_loss):
        losses = loss_fn(*inputs, gamma=0.3, temperature=T, direction=direction, vocab_size=vocab_size,
                         num_tokens=num_tokens)
        assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_fn", [on_logits, distillation_loss])
def test_there_is_no_factor_of_t_squared(loss_fn):
    student_hidden, student_head, teacher_hidden, teacher_head, targets = example()
    kl = loss_fn(student_hidden, student_head, teacher_hidden, teacher_head, targets, temperature=1.0)[2]
    scaled = loss_fn(2 * student_hidden, student_head, 2 * teacher_hidden, teacher_head, targets, temperature=2.0)[2]
    torch.testing.assert_close(scaled, kl)


# ----------------------------------------------- From hidden states equals on logits -------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000, None])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5])
def test_value_and_gradients_are_those_on_logits(gamma, temperature, direction, chunk_size):
    assert_is_dense(example((13, 17)), gamma=gamma, temperature=temperature, direction=direction, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_tokens", [None, 23, torch.tensor(23)], ids=["counted", "given", "given as a tensor"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("rows, vocab_size", [((13, 13), None), ((13, 17), None), ((17, 13), None), ((17, 15), 13)])
def test_rows_and_ignored_targets_count_as_on_logits(rows, vocab_size, ignored, num_tokens, dtype):
    for chunk_size in (3, None):
        assert_is_dense(example(rows, ignored=ignored, dtype=dtype), vocab_size=vocab_size, num_tokens=num_tokens,
                        temperature=2.0, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_without_a_teacher_it_is_cross_entropy(chunk_size):
    student_hidden, student_head, _, _, targets = example()
    inputs = student_hidden, student_head, None, None, targets
    loss, ce, kl = distillation_loss(*inputs, chunk_size=chunk_size)
    expected = F.cross_entropy((student_hidden @ student_head.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected)
    assert loss.item() == ce.item() and kl.item() == 0
    assert_is_dense(inputs, chunk_size=chunk_size)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 2)], ids=str)
def test_tokens_may_come_in_any_shape(shape):
    assert_is_dense(example(shape=shape, ignored="none"), chunk_size=4)


def test_tensors_need_not_be_contiguous():
    student_hidden, student_head, teacher_hidden, teacher_head, targets = example()
    inputs = (student_hidden.detach().transpose(0, 1), student_head.detach().T.contiguous().T,
              teacher_hidden.transpose(0, 1), teacher_head.T.contiguous().T, targets.T)
    assert not any(tensor.is_contiguous() for tensor in inputs)
    inputs[0].requires_grad_(), inputs[1].requires_grad_()
    assert_is_dense(inputs, chunk_size=3)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradients_are_the_finite_differences(direction):
    inputs = example((9, 11), shape=(5,))
    settings = dict(gamma=0.5, temperature=2.0, direction=direction, vocab_size=8, chunk_size=2)
    for tensor, gradient in zip(inputs, with_gradients(distillation_loss, inputs, **settings)[3:]):
        values, slopes = tensor.detach().view(-1), []
        for i, value in enumerate(values.tolist()):
            ends = []
            for values[i] in (value + 1e-5, value - 1e-5):
                ends.append(distillation_loss(*inputs, **settings)[0].item())
            values[i] = value
            slopes.append((ends[0] - ends[1]) / 2e-5)
        torch.testing.assert_close(gradient.flatten(), torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_logits_in_the_hundreds_do_not_overflow(direction, dtype):
    inputs = example(dtype=dtype)
    for tensor in inputs[:4]:
        tensor.data *= 10
    assert F.linear(inputs[0], inputs[1]).max() > 200
    results = with_gradients(distillation_loss, inputs, direction=direction, chunk_size=3)
    assert all(result.isfinite().all() for result in results)
    assert_equal(results, with_gradients(on_logits, inputs, direction=direction), 1e-5)


def test_bfloat16_hidden_states_give_a_float32_loss_and_bfloat16_gradients():
    inputs = example(dtype=torch.bfloat16)
    results = with_gradients(distillation_loss, inputs, chunk_size=3)
    assert [result.dtype for result in results] == 3 * [torch.float32] + 2 * [torch.bfloat16]
    exact = [tensor.detach().double() for tensor in inputs[:4]]
    expected = with_gradients(on_logits, [*(tensor.requires_grad_() for tensor in exact), inputs[4]])
    assert_equal([result.double() for result in results], expected, 0.03)


def test_under_autocast_gradients_keep_the_dtype_of_the_weights():
    inputs = example(dtype=torch.float32)
    expected = with_gradients(on_logits, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distillation_loss(*inputs, chunk_size=3)
    gradients = torch.autograd.grad(losses[0], inputs[:2])
    assert_equal([*(loss.detach() for loss in losses), *gradients], expected, 0.03)


# ----------------------------------------------- What counts, and what does not ------------------------------------


@pytest.mark.parametrize("loss_fn", [on_logits, distillation_loss])
def test_padded_rows_count_in_ce_alone(loss_fn):
    student_hidden, student_head, teacher_hidden, teacher_head, targets = example((16, 15))
    targets = targets.clamp(max=12)

    def losses(student_head, teacher_head):
        return loss_fn(student_hidden, student_head, teacher_hidden, teacher_head, targets, vocab_size=13)

    loss, ce, kl = losses(student_head, teacher_head)
    huge_student, huge_teacher = student_head.detach().clone(), teacher_head.clone()
    huge_student[13:] *= 100
    huge_teacher[13:] *= 1000
    assert_equal(losses(student_head, huge_teacher), (loss, ce, kl), 0)
    _, ce_padded, kl_padded = losses(huge_student, teacher_head)
    torch.testing.assert_close(kl_padded, kl, rtol=1e-12, atol=0)
    assert ce_padded > ce + 1


@pytest.mark.parametrize("rows", [(16, 13), (13, 16)], ids=["wider student", "wider teacher"])
def test_the_divergence_is_over_the_smaller_number_of_rows_by_default(rows):
    assert_equal(distillation_loss(*example(rows)), distillation_loss(*example(rows), vocab_size=13), 0)


def test_the_gradient_pushes_padded_rows_down():
    student_hidden, student_head, teacher_hidden, teacher_head, targets = example((16, 13))
    eye = torch.eye(16, dtype=torch.float64)
    logits = F.linear(student_hidden, student_head).detach().requires_grad_()
    distillation_loss(logits, eye, teacher_hidden, teacher_head, targets)[0].backward()
    assert (logits.grad[targets != IGNORED][:, 13:] > 0).all()
    assert (logits.grad[targets == IGNORED] == 0).all()


@pytest.mark.parametrize("chunk_size", [3, None])
def test_at_gamma_0_kl_is_told_and_does_nothing(chunk_size):
    inputs = example()
    loss, ce, kl, *gradients = with_gradients(distillation_loss, inputs, gamma=0.0, chunk_size=chunk_size)
    assert loss.item() == ce.item()
    torch.testing.assert_close(kl, on_logits(*inputs, gamma=0.2)[2])
    assert kl > 0.1
    alone = with_gradients(distillation_loss, [*inputs[:2], None, None, inputs[4]], chunk_size=chunk_size)
    assert_equal(gradients, alone[3:], 1e-12)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_batch_whose_targets_are_all_ignored_is_zero(chunk_size):
    for result in with_gradients(distillation_loss, example(ignored="all"), chunk_size=chunk_size):
        assert (result == 0).all()


@pytest.mark.parametrize("chunk_size", [3, None])
def test_no_gradient_reaches_the_teacher_or_the_parts(chunk_size):
    inputs = example()
    teacher = [tensor.requires_grad_() for tensor in inputs[2:4]]
    loss, ce, kl = distillation_loss(*inputs, chunk_size=chunk_size)
    assert loss.requires_grad and not ce.requires_grad and not kl.requires_grad
    loss.backward()
    assert all(tensor.grad is None for tensor in teacher)
    assert all(tensor.grad.abs().max() > 0 for tensor in inputs[:2])


@pytest.mark.parametrize("chunk_size", [3, None])
def test_either_gradient_comes_alone(chunk_size):
    inputs = example()
    expected = with_gradients(on_logits, inputs)[3:]
    for i in (0, 1):
        alone = [tensor.detach() for tensor in inputs]
        alone[i].requires_grad_()
        distillation_loss(*alone, chunk_size=chunk_size)[0].backward()
        assert_equal([alone[i].grad], [expected[i]], 1e-10)
        assert alone[1 - i].grad is None


def test_gradients_scale_with_what_follows_the_loss():
    inputs = example()
    expected = with_gradients(on_logits, inputs)[3:]
    (distillation_loss(*inputs, chunk_size=3)[0] * -2.5 + 1).backward()
    assert_equal([tensor.grad for tensor in inputs[:2]], [-2.5 * gradient for gradient in expected], 1e-10)


def test_the_inputs_are_left_as_they_are():
    inputs = example()
    before = [tensor.detach().clone() for tensor in inputs]
    distillation_loss(*inputs, chunk_size=3)[0].backward()
    assert all(tensor.equal(copy) for tensor, copy in zip(inputs, before))


def test_values_are_the_same_without_gradients():
    inputs = example()
    expected = distillation_loss(*inputs, chunk_size=3)
    with torch.no_grad():
        losses = distillation_loss(*inputs, chunk_size=3)
    assert not losses[0].requires_grad
    assert_equal(losses, expected, 1e-12)


def test_micro_batches_add_up_to_the_batch():
    inputs = example(shape=(6, 5))
    total = (inputs[4] != IGNORED).sum().item()
    expected, sums = with_gradients(distillation_loss, inputs), 0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = inputs[0].detach()[rows].requires_grad_(), inputs[1], inputs[2][rows], inputs[3], inputs[4][rows]
        loss, ce, kl, of_hidden, of_head = with_gradients(distillation_loss, part, num_tokens=total, chunk_size=4)
        assert_equal([of_hidden], [expected[3][rows]], 1e-10)
        sums = sums + torch.cat([torch.stack((loss, ce, kl)), of_head.flatten()])
    assert_equal([sums], [torch.cat([torch.stack(expected[:3]), expected[4].flatten()])], 1e-10)


def test_tied_weights_get_the_gradients_of_embedding_and_head():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig.scratch(1, 32, 13, 16)).double()
    _, _, teacher_hidden, teacher_head, targets = example()
    idx = targets.clamp(min=0)
    gradients = []
    for loss_fn in (on_logits, distillation_loss):
        gpt.zero_grad()
        gpt(idx, loss_fn=lambda *student: loss_fn(*student, teacher_hidden, teacher_head, targets)[0]).backward()
        gradients.append([parameter.grad.clone() for parameter in gpt.parameters()])
    assert_equal(*gradients, 1e-5)  # rotary angles are float32


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="backward"):
        distillation_loss(*example(), direction="backward")


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_chunks_never_hold_the_logits_of_all_tokens(direction):
    inputs, chunk_size = example((200, 210), shape=(64,)), 8
    with LargestTensor() as seen:
        distillation_loss(*inputs, direction=direction, chunk_size=chunk_size)[0].backward()
    assert chunk_size * 200 <= seen.elements <= 2 * chunk_size * 210 < 64 * 200 / 3
    with LargestTensor() as seen:
        on_logits(*inputs, direction=direction)[0].backward()
    assert seen.elements >= 64 * 200


def test_chunks_keep_no_logits_for_the_backward_pass():
    def kept(loss_fn, **settings):
        """Elements that the graph holds on to."""
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: storages.update({tensor.data_ptr(): tensor.numel()}) or tensor, lambda tensor: tensor):
            loss = loss_fn(*example((200, 210), shape=(64,)), **settings)[0]
        assert loss.requires_grad
        return sum(storages.values())

    assert kept(distillation_loss, chunk_size=8) < 64 * 200 / 3 < kept(on_logits)


def test_a_large_batch_is_cut_into_chunks_by_default():
    inputs = example((2**15, 2**15), shape=(2**10,), dtype=torch.float32)
    with LargestTensor() as seen, torch.no_grad():
        distillation_loss(*inputs)
    assert seen.elements < 2**25


def products(**settings):
    """Matrix products that a loss and its gradients take, in one chunk, by whose gradients are wanted."""
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    inputs = list(example())
    for i, name in ((0, "hidden"), (1, "head")):
        inputs[i] = inputs[i].detach().requires_grad_(settings.get(name, True))
    if not settings.get("teacher", True):
        inputs[2] = inputs[3] = None
    with Products() as seen, torch.set_grad_enabled(settings.get("grad", True)):
        loss = distillation_loss(*inputs)[0]
        if loss.requires_grad:
            loss.backward()
    return seen.count


def test_no_product_is_made_in_vain():
    assert products() == 4
    assert products(hidden=False) == products(head=False) == 3
    assert products(grad=False) == products(hidden=False, head=False) == 2
    assert products(grad=False, teacher=False) == 1


def test_gradients_are_spent_after_one_backward_pass():
    loss = distillation_loss(*example())[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):  # they were scaled in place
        loss.backward()


def test_no_tokens_at_all_are_zero():
    inputs = example(shape=(0,))
    for result in with_gradients(distillation_loss, inputs):
        assert (result == 0).all()


@pytest.mark.parametrize("loss_fn", [on_logits, distillation_loss])
def test_more_ids_than_rows_are_refused(loss_fn):
    with pytest.raises(ValueError, match="vocab_size 14 .* 13 rows"):
        loss_fn(*example((15, 13)), vocab_size=14)


def test_bfloat16_gradients_of_many_chunks_add_up_in_float32():
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(600, dtype=torch.int64)
    distillation_loss(hidden, head, None, None, targets, num_tokens=1, chunk_size=1)[0].backward()
    assert head.grad.flatten().tolist() == [-300, 300]  # each adds 1/2, which 256 in bfloat16 would swallow


def test_in_bfloat16_a_sure_prediction_has_a_gradient_still():
    logits = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    distillation_loss(logits, torch.eye(2, dtype=torch.bfloat16), None, None, torch.tensor([0]))[0].backward()
    surplus = 1 / (1 + math.exp(7))  # 0.0009, a quarter of the step from 1 to the bfloat16 before
    assert logits.grad.flatten().tolist() == pytest.approx([-surplus, surplus], rel=0.01)


LARGE = dict(rows=(2**14, 2**14 + 5), shape=(2**10 + 40,), dtype=torch.float32)  # enough logits that it compiles


@pytest.fixture
def fresh_compiler():
    compiled_eq3_rows.cache_clear()
    yield
    compiled_eq3_rows.cache_clear()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_it_is_dense(fresh_compiler):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_is_dense(example(**LARGE), vocab_size=2**14 - 3, temperature=2.0)


def test_without_a_compiler_it_runs_all_the_same_and_says_so_once(fresh_compiler, monkeypatch):
    def no_compiler(function):
        def compiled(*args):
            raise RuntimeError("no C++ compiler")
        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(UserWarning, match="no C.. compiler") as told:
        assert_is_dense(example(**LARGE))
        assert_is_dense(example(**LARGE), direction="reverse")
    assert len([warning for warning in told if "no C++ compiler" in str(warning.message)]) == 1


# ----------------------------------------------- Learning rate and optimizers --------------------------------------


def test_the_learning_rate_warms_up_then_falls_as_a_cosine():
    config = Config(lr=3e-3, min_lr=1e-3, warmup_steps=4, max_steps=25)
    rates = [learning_rate(step, config) for step in range(25)]
    assert rates[:4] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3])
    assert rates[4] == 3e-3
    assert rates[14] == pytest.approx(2e-3)  # half way from step 4 to step 24
    assert rates[9] == pytest.approx(2e-3 + 1e-3 / math.sqrt(2))
    assert rates[24] == 1e-3
    assert sorted(rates[4:], reverse=True) == rates[4:]


@pytest.mark.parametrize("warmup_steps, max_steps, first, last", [
    (0, 10, 1.0, 0.1),
    (0, 2, 1.0, 0.1),
    (10, 4, 0.1, 0.4),  # ends while it warms up
    (4, 4, 0.25, 1.0),
    (1000, 30_000, 0.001, 0.1),  # the paper's
])
def test_the_learning_rate_at_the_first_and_the_last_step(warmup_steps, max_steps, first, last):
    config = Config(lr=1.0, min_lr=0.1, warmup_steps=warmup_steps, max_steps=max_steps)
    assert learning_rate(0, config) == first
    assert learning_rate(max_steps - 1, config) == last


def small_gpt(tied: bool) -> GPT:
    return GPT(GPTConfig(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
                         attention_bias=True, mlp_bias=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(optimizer, tied):
    gpt = small_gpt(tied)
    optimizers = make_optimizers(gpt, Config(lr=2e-3, weight_decay=0.3, optimizer=optimizer))
    groups = [(type(o).__name__, group, parameter) for o in optimizers for group in o.param_groups
              for parameter in group["params"]]
    grouped = {id(parameter): (kind, group) for kind, group, parameter in groups}
    assert len(groups) == len(grouped) == len(list(gpt.parameters()))
    for name, parameter in gpt.named_parameters():
        kind, group = grouped[id(parameter)]
        assert group["lr"] == 2e-3
        assert group["weight_decay"] == (0.3 if parameter.dim() == 2 else 0)
        in_muon = optimizer == "muon" and parameter.dim() == 2 and name.startswith("layers.")
        assert kind == ("Muon" if in_muon else "AdamW"), name


# ----------------------------------------------- Perplexity --------------------------------------------------------


def lively_gpt() -> GPT:
    gpt = small_gpt(tied=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in gpt.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return gpt


def val_windows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(9, (7, 13), generator=generator) for name in ("code", "prose")}


def test_perplexity_is_exp_of_the_mean_cross_entropy_over_the_tokenizers_ids():
    gpt, windows = lively_gpt(), val_windows()
    measured = perplexities(gpt, windows, 9, 3)
    assert list(measured) == ["code", "prose"]
    for name, domain in windows.items():
        logits = gpt(domain)[:, :-1, :9].double()  # transformers' way: all of the window in, the last prediction unused
        ce = F.cross_entropy(logits.reshape(-1, 9), domain[:, 1:].flatten())
        assert isinstance(measured[name], float)
        assert measured[name] == pytest.approx(ce.exp().item(), rel=1e-5)
    gpt.lm_head.weight.data[9:] *= 1e4  # rows beyond the tokenizer's ids
    assert perplexities(gpt, windows, 9, 3) == measured


def test_perplexity_of_a_uniform_model_is_the_number_of_ids():
    gpt = lively_gpt()
    gpt.lm_head.weight.data.zero_()
    assert perplexities(gpt, val_windows(), 9, 3) == {"code": pytest.approx(9), "prose": pytest.approx(9)}


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_perplexity_is_the_same_for_any_batch(batch):
    gpt, windows = lively_gpt(), val_windows()
    assert perplexities(gpt, windows, 9, batch) == pytest.approx(perplexities(gpt, windows, 9, 3), rel=1e-5)


def test_perplexity_leaves_random_state_gradients_and_weights():
    gpt = lively_gpt()
    gpt(val_windows()["code"]).logsumexp(dim=-1).sum().backward()
    before = torch.get_rng_state(), [(p.detach().clone(), p.grad.clone()) for p in gpt.parameters()]
    perplexities(gpt, val_windows(), 9, 3)
    assert torch.get_rng_state().equal(before[0])
    for parameter, (weight, grad) in zip(gpt.parameters(), before[1]):
        assert parameter.equal(weight) and parameter.grad.equal(grad) and parameter.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("keys", [{}, dict(direction="reverse", temperature=2.0, vocab_size=9), dict(temperature=0.5)])
def test_token_weights_multiply_each_tokens_terms(keys):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(2, 3, 5), torch.randn(11, 5)
    targets = torch.tensor([[1, 2, -100], [4, 10, 0]])
    weights = torch.tensor([[0.5, 2.0, 7.0], [0.0, 1.0, 3.0]])
    ours = distillation_loss(hidden, head, teacher_hidden, teacher_head, targets, gamma=0.7, num_tokens=6.5,
                             token_weights=weights, chunk_size=4, **keys)
    each = [[weights[i, j] * part for part in dense_distillation_loss(  # of one token
        hidden[i, j:j + 1] @ head.T, teacher_hidden[i, j:j + 1] @ teacher_head.T, targets[i, j:j + 1],
        gamma=0.7, **keys)]
        for i in range(2) for j in range(3) if targets[i, j] >= 0]
    wanted = [sum(parts) / 6.5 for parts in zip(*each)]
    torch.testing.assert_close(list(ours), wanted)
    for got, exact in zip(*(torch.autograd.grad(losses[0], (hidden, head)) for losses in (ours, wanted))):
        torch.testing.assert_close(got, exact)


def test_a_sure_tokens_cross_entropy_keeps_its_digits_at_large_logits():
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[1000.0], [991.0]])
    _, ce, _ = distillation_loss(hidden, head, None, None, torch.tensor([0]))
    assert ce.item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)
