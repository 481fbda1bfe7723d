"""All layers as one node, with real launches: against the fused layers one by one, over shapes that return and change."""

from __future__ import annotations

import pytest
import torch

from nbkit.models.layer import Keep, stack
from tests.models.layer.rig import fill, step, worst
from tests.models.layer.test_layer import bound
from tests.models.layer.test_layer_gpu import lora_on_gpu, on_gpu, packed_on_gpu

pytestmark = pytest.mark.gpu


def one_by_one(model, inputs):
    hook = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: None)
    try:
        return step(model, **inputs)
    finally:
        hook.remove()


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_same_as_one_by_one(family, dtype, four_bit, monkeypatch):
    if four_bit and dtype == torch.float32:
        pytest.skip("16 bits are what NF4 computes in")
    model = lora_on_gpu(family, dtype, four_bit, num_hidden_layers=4)
    binding = bound(model, Keep(0, normed=True))
    runs, real = [], stack.forward
    monkeypatch.setattr(stack, "forward", lambda *given: runs.append(1) or real(*given))
    # Shapes return: the fourth step of one goes by prepared launches alone, its attention is cuDNN's from the second on.
    for tokens, seed in ((77, 1), (77, 2), (77, 3), (77, 4), (64, 5), (64, 6), (64, 7), (64, 8), (2, 9), (77, 10)):
        inputs = on_gpu(tokens=tokens, seed=seed)
        loss, grads = step(model, **inputs)
        want, truth = one_by_one(model, inputs)
        assert abs(loss - want) <= 2e-3 * abs(want)
        # With one or two tokens q and k get nothing but rounding: it is small beside what the others get.
        floor = 1e-3 * max(float(t.norm()) for t in truth.values())
        for name, t in truth.items():
            error = float((grads[name] - t).norm()) / max(float(t.norm()), floor)
            assert error <= (1e-4 if dtype == torch.float32 else 3e-2), f"{tokens} tokens, {name}: {error:.1e}"
        fill(model, seed)  # other adapters in the next step
    assert len(runs) == 10 and binding.reasons == {}
    binding.release()


def test_packs(monkeypatch):
    model = lora_on_gpu(dtype=torch.bfloat16)
    binding = bound(model, Keep(0, normed=True))
    runs, real = [], stack.forward
    monkeypatch.setattr(stack, "forward", lambda *given: runs.append(1) or real(*given))
    for lengths in ([3, 61, 1, 40], [50, 55], [105], [3, 61, 1, 40]):
        inputs = packed_on_gpu(lengths)
        loss, grads = step(model, **inputs)
        want, truth = one_by_one(model, inputs)
        assert abs(loss - want) <= 2e-3 * abs(want) and worst(grads, truth)[0] <= 3e-2
    assert len(runs) == 4
    binding.release()


def test_a_step_in_full_and_one_by_prepared_launches_give_the_same_bits():
    """Nothing that a launch was given before is read in place of what it is given now."""
    model = lora_on_gpu(dtype=torch.float32)  # plain attention: its backward adds in one order
    binding = bound(model, Keep(0, normed=True))
    inputs, other = on_gpu(tokens=64, seed=1), on_gpu(tokens=64, seed=2)
    first = step(model, **inputs)
    for _ in range(4):
        step(model, **other)
    again = step(model, **inputs)
    assert again[0] == first[0] and worst(again[1], first[1])[0] == 0
    binding.release()


def test_memory_comes_back():
    model = lora_on_gpu(dtype=torch.bfloat16)
    inputs = on_gpu(tokens=256, seed=1)
    step(model, **inputs)
    binding = bound(model, Keep(0, normed=True))
    step(model, **on_gpu(tokens=8, seed=1))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step(model, **inputs)
    held = torch.cuda.memory_allocated() - before
    layout = binding.stacks.layout
    rows = inputs["input_ids"].numel()
    assert 0 < held <= 1.1 * (layout.room_bytes(rows) + layout.kept_bytes(rows, 2)) + 2**20
    binding.stacks.drop()
    assert torch.cuda.memory_allocated() - before <= 2**20
    binding.release()


def test_a_recorded_step_needs_no_buffers_of_eager_ones():
    import nbkit
    from nbkit.models.forwards import GRAPHS
    from nbkit.models.layer import binding_of

    model = lora_on_gpu(dtype=torch.bfloat16)
    nbkit.patch(model)
    binding = binding_of(model)
    inputs, other = on_gpu(tokens=64, seed=1), on_gpu(tokens=40, seed=2)
    eager = step(model, **inputs)
    assert binding.stacks.room is not None
    for _ in range(3):
        recorded = step(model, **inputs)
    assert vars(model.get_base_model())[GRAPHS].recorded, vars(model.get_base_model())[GRAPHS].note
    assert binding.stacks.room is None and worst(recorded[1], eager[1])[0] <= 3e-2
    between = step(model, **other)  # an eager step of another shape, and the recorded one again
    assert binding.stacks.room is not None and between[0] > 0
    again = step(model, **inputs)
    assert worst(again[1], recorded[1])[0] <= 3e-2
    nbkit.unpatch(model)
