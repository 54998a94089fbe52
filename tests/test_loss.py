"""Eq. 3 on logits and from hidden states; perplexity; learning rate."""

import functools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import distill
from distill import Config, dense_distillation_loss, distillation_loss, learning_rate, perplexities
from model import GPT, GPTConfig

IGNORED = -100

# name → rows of the student's and of the teacher's head, vocab_size
HEADS = {
    "alike": ((13, 13), None),
    "wider teacher": ((13, 17), None),
    "wider student": ((17, 13), None),
    "padded": ((17, 15), 13),
}
PRECISIONS = {  # name → dtype of the inputs, and tolerance: a share of the largest entry
    "float64": (torch.float64, 1e-10),
    "float32": (torch.float32, 1e-5),
    "bfloat16": (torch.bfloat16, 0.02),
    "autocast": (torch.float32, 0.02),
}


def eq3(student_logits, teacher_logits, targets, token_weights, gamma, *, temperature, direction, vocab_size,
        num_tokens):
    """Return the loss, and ce and kl of each token, by Eq. 3 as printed, in loops over Python numbers."""
    def softmax(logits):
        exponentials = [math.exp(z / temperature) for z in logits[:vocab_size]]
        return [e / sum(exponentials) for e in exponentials]

    loss = 0.0
    ce = [0.0] * len(targets)
    kl = [0.0] * len(targets)
    tokens = zip(*(values.tolist() for values in (student_logits, teacher_logits, targets, token_weights, gamma)))
    for i, (z_S, z_T, target, weight, coefficient) in enumerate(tokens):
        if target == IGNORED:
            continue
        ce[i] = math.log(sum(math.exp(z) for z in z_S)) - z_S[target]
        first = softmax(z_T)
        second = softmax(z_S)
        if direction == "reverse":
            first, second = second, first
        kl[i] = sum(p * math.log(p / q) for p, q in zip(first, second))
        loss += weight * (ce[i] + coefficient * kl[i]) / num_tokens
    return loss, ce, kl


def example(rows=(13, 13), shape=(2, 5), ignored="some", dtype=torch.float64):
    """Return random [student_hidden, student_head, teacher_hidden, teacher_head, targets]; heads have `rows`."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((*shape, 4), (rows[0], 4), (*shape, 6), (rows[1], 6))
    inputs = [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    targets = torch.randint(min(rows), shape, generator=generator)
    if ignored == "some":
        targets.view(-1)[1::3] = IGNORED
    elif ignored == "all":
        targets[:] = IGNORED
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    return [*inputs, targets]


def weights_like(targets):
    return torch.linspace(0, 2, targets.numel()).view(targets.shape)


def on_logits(student_hidden, student_head, teacher_hidden, teacher_head, targets, chunk_size=None, **equation):
    """Compute dense_distillation_loss with the signature of distillation_loss: the oracle."""
    teacher_logits = None
    if teacher_hidden is not None:
        teacher_logits = F.linear(teacher_hidden, teacher_head)
    return dense_distillation_loss(F.linear(student_hidden, student_head), teacher_logits, targets, **equation)


BOTH = pytest.mark.parametrize("loss_fn", [on_logits, distillation_loss], ids=["dense", "chunked"])


def with_gradients(loss_fn, inputs, autocast=False, **keywords):
    """Return [loss, ce, kl, and the gradients of student_hidden and student_head]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, ce, kl = loss_fn(*inputs, **keywords)
    assert ce.shape == kl.shape == inputs[4].shape and not ce.requires_grad and not kl.requires_grad
    return [loss.detach(), ce, kl, *torch.autograd.grad(loss, inputs[:2])]


def assert_equal(results, expected, tolerance):
    """Check for equal shapes and dtypes, and finite values within `tolerance` of each tensor's largest."""
    for result, wanted in zip(results, expected, strict=True):
        assert wanted.isfinite().all()
        scale = 1e-3
        if wanted.numel():
            scale = max(scale, wanted.abs().max().item())
        torch.testing.assert_close(result, wanted, rtol=0, atol=tolerance * scale)


def assert_is_dense(inputs, precision="float64", **keywords):
    autocast = precision == "autocast"
    results = with_gradients(distillation_loss, inputs, autocast, **keywords)
    expected = with_gradients(on_logits, inputs, autocast, **keywords)
    assert_equal(results, expected, PRECISIONS[precision][1])


# ------------ The equation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equation, kl", [
    ({}, 0.1308120359),  # 3/4 ln 3/2 + 1/4 ln 1/2
    (dict(direction="reverse"), 0.1438410362),  # 1/2 ln 2/3 + 1/2 ln 2
])
def test_two_tokens_by_hand_with_the_papers_values_as_defaults(equation, kl):
    student = torch.tensor([[1 / 2, 1 / 2], [3 / 4, 1 / 4]], dtype=torch.float64).log()
    teacher = torch.tensor([[3 / 4, 1 / 4], [3 / 4, 1 / 4]], dtype=torch.float64).log()
    targets = torch.tensor([0, 1])
    identity = torch.eye(2, dtype=torch.float64)
    for loss, *per_token in (dense_distillation_loss(student, teacher, targets, **equation),
                             distillation_loss(student, identity, teacher, identity, targets, **equation)):
        assert loss.item() == pytest.approx((math.log(2) + math.log(4) + 0.2 * kl) / 2, abs=1e-10)
        assert torch.cat(per_token).tolist() == pytest.approx([math.log(2), math.log(4), kl, 0], abs=1e-10)


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("weighted", [False, True])
def test_both_losses_are_eq_3_and_ce_and_kl_of_each_token_are_without_weights_and_gamma(
        loss_fn, temperature, direction, heads, weighted):
    rows, vocab_size = HEADS[heads]
    inputs = example(rows)
    logits = [F.linear(inputs[0], inputs[1]), F.linear(inputs[2], inputs[3])]
    weights, gamma, num_tokens = torch.ones(2, 5), torch.full((2, 5), 0.3, dtype=torch.float64), 7
    keywords = dict(gamma=0.3)
    if weighted:
        weights, gamma, num_tokens = weights_like(inputs[4]), 1 - weights_like(inputs[4]) / 2, 6.5
        keywords = dict(gamma=gamma, token_weights=weights, num_tokens=num_tokens)
    equation = dict(temperature=temperature, direction=direction)
    per_token = [tensor.flatten(0, 1) for tensor in (*logits, inputs[4], weights, gamma)]
    expected = eq3(*per_token, vocab_size=13, num_tokens=num_tokens, **equation)
    losses = loss_fn(*inputs, vocab_size=vocab_size, **equation, **keywords)
    for ours, exact in zip(losses, expected):
        assert ours.flatten().tolist() == pytest.approx(exact if isinstance(exact, list) else [exact], rel=1e-12)
    assert all((values[inputs[4] == IGNORED] == 0).all() for values in losses[1:])


@pytest.mark.parametrize("equation", [{}, dict(direction="reverse", temperature=2.0, vocab_size=8)])
def test_the_gradient_of_the_equation_is_its_finite_difference(equation):
    _, _, teacher_hidden, teacher_head, targets = example((9, 11), shape=(5,))
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher_logits = F.linear(teacher_hidden, teacher_head)
    assert torch.autograd.gradcheck(
        lambda z: dense_distillation_loss(z, teacher_logits, targets, gamma=0.5, **equation)[0], logits)


@BOTH
def test_without_a_teacher_or_at_gamma_0_it_is_cross_entropy_and_a_teachers_kl_is_returned(loss_fn):
    inputs = example()
    _, _, kl = loss_fn(*inputs)
    ce = F.cross_entropy(F.linear(*inputs[:2]).transpose(1, 2), inputs[4], ignore_index=IGNORED, reduction="none")
    cross_entropy = ce.sum() / 7
    gradients = torch.autograd.grad(cross_entropy, inputs[:2])
    ce, cross_entropy = ce.detach(), cross_entropy.detach()
    for teacher, keywords, kl in ([None, None], {}, torch.zeros_like(ce)), (inputs[2:4], dict(gamma=0.0), kl):
        results = with_gradients(loss_fn, [*inputs[:2], *teacher, inputs[4]], **keywords)
        assert_equal(results, [cross_entropy, ce, kl, *gradients], 1e-12)


def test_a_sure_prediction_in_bfloat16_still_has_a_gradient():
    logits = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    distillation_loss(logits, torch.eye(2, dtype=torch.bfloat16), None, None, torch.tensor([0]))[0].backward()
    surplus = 1 / (1 + math.exp(7))  # 0.0009, a quarter of the step from 1 to the bfloat16 before
    assert logits.grad.flatten().tolist() == pytest.approx([-surplus, surplus], rel=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_logits_of_1000_and_rows_beyond_the_tokenizers_ids_have_the_gradients_of_a_cut_softmax(direction, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 300 * torch.randn(2, 20, 64, generator=generator)
    student[0] *= 3
    teacher[:, 50:] = 1000.0  # which the tokenizer does not know
    targets = torch.randint(50, (20,), generator=generator)
    student.requires_grad_()
    loss, _, kl = dense_distillation_loss(student, teacher, targets, gamma=0.5, vocab_size=50, direction=direction,
                                          temperature=temperature)
    gradient, = torch.autograd.grad(loss, student)

    exact = student.detach().double().requires_grad_()
    first = F.log_softmax(teacher[:, :50].double() / temperature, dim=-1)
    second = F.log_softmax(exact[:, :50] / temperature, dim=-1)
    if direction == "reverse":
        first, second = second, first
    exact_kl = F.kl_div(second, first, reduction="none", log_target=True).sum(dim=-1)
    exact_loss = F.cross_entropy(exact, targets) + 0.5 * exact_kl.mean()
    exact_gradient, = torch.autograd.grad(exact_loss, exact)
    results = [tensor.detach().double() for tensor in (loss, kl, gradient)]
    assert_equal(results, [exact_loss.detach(), exact_kl.detach(), exact_gradient], 1e-5)


@BOTH
@pytest.mark.parametrize("equation, message", [
    (dict(direction="backward"), "backward"),
    (dict(vocab_size=14), "vocab_size 14 .* 13 rows"),
])
def test_unknown_directions_and_too_large_vocabularies_are_rejected(loss_fn, equation, message):
    with pytest.raises(ValueError, match=message):
        loss_fn(*example((15, 13)), **equation)


# ------------ From hidden states it is the same -----------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 1000, None])  # of 10 tokens
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("direction, temperature, scale", [("forward", 1.0, 100), ("forward", 2.0, 1),
                                                           ("reverse", 0.5, 100)])
def test_values_and_gradients_are_the_dense_ones_for_any_chunk(
        chunk_size, precision, heads, direction, temperature, scale):
    rows, vocab_size = HEADS[heads]
    inputs = example(rows, dtype=PRECISIONS[precision][0])
    inputs[1].data *= scale  # logits in the hundreds must not overflow
    inputs[3] *= scale
    assert_is_dense(inputs, precision, chunk_size=chunk_size, vocab_size=vocab_size, direction=direction,
                    temperature=temperature, gamma=0.5)


@pytest.mark.parametrize("shape, ignored", [((1,), "none"), ((2, 3, 2), "some"), ((2, 5), "all"), ((0,), "none")])
@pytest.mark.parametrize("num_tokens", [None, 6.5, torch.tensor(23)], ids=["counted", "number", "tensor"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_come_in_any_shape_and_count_as_in_the_dense_loss(shape, ignored, num_tokens, precision):
    inputs = example(shape=shape, ignored=ignored, dtype=PRECISIONS[precision][0])
    weights = weights_like(inputs[4])
    assert_is_dense(inputs, precision, num_tokens=num_tokens, chunk_size=4, token_weights=weights, gamma=1 + weights)


@pytest.mark.parametrize("shape", [(2, 5), (5,), (2, 1), (1,), (), (2, 5, 13), (2, 1, 13)], ids=str)
def test_a_forks_keyword_with_a_value_or_a_row_per_target_is_cut_into_chunks_with_the_tokens(monkeypatch, shape):
    """The fork's keyword is a factor of the student's logits: one per target, or a row with one per id."""
    def with_factor(student_logits, teacher_logits, targets, *, factor, **equation):
        if 0 < factor.dim() <= targets.dim():  # a value for each target
            factor = factor.expand_as(targets).unsqueeze(-1)
        return dense_distillation_loss(factor * student_logits, teacher_logits, targets, **equation)

    inputs = example()
    factor = torch.linspace(1, 2, math.prod(shape), dtype=torch.float64).view(shape)
    expected = with_gradients(
        lambda hidden, head, *rest: with_factor(F.linear(hidden, head), F.linear(*rest[:2]), rest[2], factor=factor),
        inputs)
    monkeypatch.setattr(distill, "dense_distillation_loss", with_factor)
    assert_equal(with_gradients(distillation_loss, inputs, chunk_size=3, factor=factor), expected, 1e-10)


@pytest.mark.parametrize("shape", [(10,), (3, 5), (5, 2), (10, 13), (2, 4, 13), (5, 2, 13)], ids=str)
def test_a_tensor_of_another_shape_than_the_targets_is_rejected(shape):
    with pytest.raises(RuntimeError, match="expand"):
        distillation_loss(*example(), token_weights=torch.ones(shape))
    student_hidden, *rest, targets = example()
    with pytest.raises(AssertionError):
        distillation_loss(student_hidden, *rest, torch.zeros(shape, dtype=torch.long))


def test_tensors_need_not_be_contiguous_and_are_not_changed():
    student_hidden, student_head, teacher_hidden, teacher_head, targets = example()
    inputs = [student_hidden.detach().transpose(0, 1).requires_grad_(),
              student_head.detach().T.contiguous().T.requires_grad_(),
              teacher_hidden.transpose(0, 1), teacher_head.T.contiguous().T, targets.T]
    assert not any(tensor.is_contiguous() for tensor in inputs)
    before = [tensor.detach().clone() for tensor in inputs]
    assert_is_dense(inputs, chunk_size=3)
    assert all(tensor.equal(copy) for tensor, copy in zip(inputs, before))


@pytest.mark.parametrize("trained", [[0], [1], [0, 1]], ids=["hidden states", "head", "both"])
def test_gradients_reach_only_the_trained_tensors_of_the_student_and_scale_with_the_loss(trained):
    inputs = example()
    expected = with_gradients(on_logits, inputs)[3:]
    inputs = [tensor.detach() for tensor in inputs]
    for i in [*trained, 2, 3]:
        inputs[i].requires_grad_()
    loss, ce, kl = distillation_loss(*inputs, chunk_size=3)
    assert not ce.requires_grad and not kl.requires_grad
    (loss * -2.5 + 1).backward(retain_graph=True)
    assert [i for i in range(4) if inputs[i].grad is not None] == trained
    assert_equal([inputs[i].grad for i in trained], [-2.5 * expected[i] for i in trained], 1e-10)
    with pytest.raises(RuntimeError):  # a second time
        loss.backward()


def test_bfloat16_gradients_of_many_chunks_add_up_in_float32():
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(600, dtype=torch.int64)
    distillation_loss(hidden, head, None, None, targets, num_tokens=1, chunk_size=1)[0].backward()
    assert head.grad.flatten().tolist() == [-300, 300]  # each adds 1/2: bfloat16 would lose it at 256


def test_the_padding_of_logits_is_0_in_any_memory(monkeypatch):
    """A bfloat16 product on a CPU with AMX reads it, and NaN times 0 is NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *size: like.new_full(size, math.nan))
    logits = distill.aligned_empty(torch.ones(1, dtype=torch.bfloat16), 3, 70)
    assert logits.shape == (3, 70) and logits.isnan().all()
    whole = logits.as_strided((3, logits.stride(0)), (logits.stride(0), 1))
    assert whole.shape == (3, 128) and (whole[:, 70:] == 0).all()


# ------------ Memory and time -----------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts the matrix products, and the elements of the largest result of an operation."""

    largest = 0
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
        return result


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("shape, rows, chunk_size, most_tokens", [((64,), 200, 8, 8), ((4096,), 512, None, 512)])
def test_it_never_holds_the_logits_of_all_tokens(direction, shape, rows, chunk_size, most_tokens):
    inputs = example((rows, rows + 10), shape)
    with Watch() as seen:
        distillation_loss(*inputs, direction=direction, chunk_size=chunk_size)[0].backward()
    aligned = math.ceil((rows + 10) / 64) * 64
    assert most_tokens * rows <= seen.largest <= most_tokens * aligned
    with Watch() as seen:
        on_logits(*inputs, direction=direction)[0].backward()
    assert seen.largest >= shape[0] * rows


def test_it_keeps_only_its_gradients_for_the_backward_pass():
    def kept(loss_fn, **keywords):
        """Return the bytes that a loss leaves allocated, without ce and kl of each token."""
        inputs = example((200, 210), shape=(64,))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            losses = loss_fn(*inputs, **keywords)
        assert losses[0].requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.key_averages()) - 2 * 8 * 64

    gradients = 8 * 64 * 4 + 8 * 200 * 4
    assert gradients <= kept(distillation_loss, chunk_size=8) < gradients + 1000
    assert kept(on_logits) > 8 * 64 * 200


@pytest.mark.parametrize("teacher, grad, products", [(True, True, 4), (True, False, 2), (False, True, 3),
                                                     (False, False, 1)])
def test_no_product_is_unnecessary_and_the_values_are_the_same_without_gradients(teacher, grad, products):
    inputs = example()
    if not teacher:
        inputs[2:4] = [None, None]
    with Watch() as seen, torch.set_grad_enabled(grad):
        losses = distillation_loss(*inputs)
        if grad:
            losses[0].backward()
    assert seen.products == products
    assert losses[0].requires_grad == grad
    assert_equal([loss.detach() for loss in losses], [loss.detach() for loss in on_logits(*inputs)], 1e-12)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    distill.compile_eq3.cache_clear()
    yield
    torch.compiler.reset()
    distill.compile_eq3.cache_clear()


@pytest.mark.skipif(not shutil.which("g++"), reason="requires a C++ compiler")
def test_the_compiled_loss_is_the_dense_one(fresh_compiler):
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    inputs = example((2**12, 2**12 + 5), shape=(2**12 + 40,), dtype=torch.float32)  # just enough to be worth compiling
    assert_is_dense(inputs, "float32", vocab_size=2**12 - 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations + 1


def test_numbers_that_change_between_steps_cause_no_recompilation(fresh_compiler, monkeypatch):
    # Only Dynamo decides whether to compile again, so its eager backend and few logits suffice.
    compiled = torch.compile(distill.eq3_of_chunk, dynamic=False, backend="eager")
    monkeypatch.setattr(distill, "eq3_of_chunk", compiled)
    stance = "default"
    for step in range(20):
        inputs = example(shape=(20 + step,), dtype=torch.float32)
        with torch.compiler.set_stance(stance):
            loss, _, _ = distillation_loss(*inputs, num_tokens=10.5 + step, gamma=0.1 + 0.01 * step, chunk_size=8,
                                           token_weights=(1 + step) * weights_like(inputs[4]))
            loss.backward()
            with torch.no_grad():  # an evaluation
                distillation_loss(*inputs[:2], None, None, inputs[4], num_tokens=1 + step, chunk_size=8)
        stance = "fail_on_recompile"


def test_ten_vocabularies_in_one_process_are_all_compiled(fresh_compiler, monkeypatch):
    counting = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    logits = torch.zeros(2, 12)
    per_token = {"targets": torch.zeros(2, dtype=torch.long)}
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own
        for vocab_size in range(2, 12):
            distill.compile_eq3()(logits.clone(), logits, per_token, {"vocab_size": vocab_size}, True)
    assert counting.frame_count == 10


# ------------ Perplexity ----------------------------------------------------------------------------------------------


def small_gpt() -> GPT:
    """Return a small model with weights far from their initial values."""
    gpt = GPT(GPTConfig(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in gpt.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return gpt


def val_windows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(9, (7, 13), generator=generator) for name in ("code", "prose")}


def measure(gpt: GPT, micro_batch_size: int = 3) -> dict[str, float]:
    config = Config(device="cpu", dtype="float32", micro_batch_size=micro_batch_size)
    return perplexities(gpt, val_windows(), vocab_size=9, config=config)


def test_perplexity_is_exp_of_the_mean_cross_entropy_over_the_tokenizers_ids():
    gpt = small_gpt()
    measured = measure(gpt)
    assert list(measured) == ["code", "prose"]
    for name, windows in val_windows().items():
        logits = gpt(windows)[:, :-1, :9].double()  # the whole window in, the last prediction unused
        ce = F.cross_entropy(logits.reshape(-1, 9), windows[:, 1:].flatten())
        assert isinstance(measured[name], float)
        assert measured[name] == pytest.approx(ce.exp().item(), rel=1e-5)

    # Neither rows beyond the tokenizer's ids count, nor how the windows are split
    gpt.lm_head.weight.data[9:] *= 1e4
    assert measure(gpt) == measured
    for micro_batch_size in (1, 2, 7, 100):
        assert measure(gpt, micro_batch_size) == pytest.approx(measured, rel=1e-5)

    # A uniform model has as many choices as ids
    gpt.lm_head.weight.data.zero_()
    assert measure(gpt) == {"code": pytest.approx(9), "prose": pytest.approx(9)}


def test_a_loss_whose_exponential_is_beyond_floats_is_a_large_perplexity():
    gpt = small_gpt()
    gpt.lm_head.weight.data *= 1e5
    assert measure(gpt) == dict.fromkeys(["code", "prose"], math.exp(700))


# ------------ Learning rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps, max_steps, expected", [
    (4, 25, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 0.55 + 0.45 / math.sqrt(2), 14: 0.55, 24: 0.1}),  # 14 is half way
    (0, 10, {0: 1.0, 9: 0.1}),
    (10, 4, {0: 0.1, 3: 0.4}),  # ends while it warms up
    (4, 4, {0: 0.25, 3: 1.0}),
    (1000, 30_000, {0: 0.001, 999: 1.0, 29_999: 0.1}),  # the paper's
])
def test_the_learning_rate_warms_up_then_falls_as_a_cosine(warmup_steps, max_steps, expected):
    config = Config(lr=1.0, min_lr=0.1, warmup_steps=warmup_steps, max_steps=max_steps)
    assert {step: learning_rate(step, config) for step in expected} == pytest.approx(expected)
