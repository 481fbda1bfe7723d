"""The fused layer on a GPU: bf16, fp16 and NF4 against fp32 truth, each attention implementation, kernels really launched."""

from __future__ import annotations

import pytest
import torch

from nbkit.kernels.nf4 import Nf4, dequantize_nf4
from nbkit.models.layer import Keep
from tests.models.layer.rig import TARGETS, batch, fill, step, worst
from tests.models.layer.test_layer import bound

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def lora_on_gpu(family="llama", dtype=torch.float32, four_bit=False, rank=8, **options):
    """A toy model on the GPU with LoRA in float32."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    from tests.tiny import tiny_model

    model = tiny_model(family, **{**SIZES, **options}).to(dtype).cuda()
    if four_bit:
        for _, parent in list(model.model.named_modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    new = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, child.bias is not None, compute_dtype=dtype, quant_type="nf4"
                    )
                    new.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                    if child.bias is not None:
                        new.bias.data = child.bias.data.clone()
                    setattr(parent, name, new.cuda())
    for p in model.parameters():
        p.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=12, target_modules=TARGETS))
    fill(model)
    return model.train()


def on_gpu(**options):
    return {k: v.cuda() for k, v in batch(**options).items()}


def compare(model, truth, inputs, keep=None, steps=2):
    """Fused and stock errors against the fp32 truth; the fused path may not be much worse than the stock one."""
    plain = {k: v for k, v in inputs.items() if "_length" not in k and "_lens" not in k}  # stock goes by the positions
    true_loss, true_grads = step(truth, **plain)
    stock_loss, stock = step(model, **plain)
    binding = bound(model, keep)
    for _ in range(steps):  # the first batch of a shape runs flash, the next cuDNN
        fused_loss, fused = step(model, **inputs)
        assert binding.reasons == {}
        for name, t in true_grads.items():
            size = t.norm().clamp(min=1e-12)
            mine, theirs = float((fused[name] - t).norm() / size), float((stock[name] - t).norm() / size)
            assert mine <= 2 * theirs + 1e-2, f"{name}: {mine:.4f}, stock {theirs:.4f}"
        assert abs(fused_loss - true_loss) <= 2 * abs(stock_loss - true_loss) + 1e-2
    how = set(binding.how)
    binding.release()
    return how


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_16_bits(family, dtype):
    truth = lora_on_gpu(family)
    model = lora_on_gpu(family, dtype)
    truth.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    for padded in (False, True):
        compare(model, truth, on_gpu(tokens=77, padded=padded))


@pytest.mark.parametrize(
    "keep",
    [
        Keep(0, 32),
        Keep(0, normed=True),
        Keep(1),
        Keep(2, 50),
        Keep(3),
        Keep(4),
        Keep(4, 64),
        Keep(2, 64, True, 2),
        Keep(3, 64, True, 1),
        Keep(4, 50, True, 2),
        Keep(4, 64, False, 1),
    ],
    ids=str,
)
def test_levels_and_tiles(keep):
    truth, model = lora_on_gpu(), lora_on_gpu(dtype=torch.bfloat16)
    truth.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    assert any("cudnn" in h or "flash" in h for h in compare(model, truth, on_gpu(tokens=77), keep))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4(dtype):
    import bitsandbytes as bnb

    model = lora_on_gpu(dtype=dtype, four_bit=True)
    truth = lora_on_gpu()
    state = {}
    for name, p in model.named_parameters():
        full = bnb.functional.dequantize_4bit(p.data, p.quant_state) if hasattr(p, "quant_state") else p.data
        state[name] = full.float()
    truth.load_state_dict(state, strict=False)
    for keep in (None, Keep(4), Keep(2, 40)):
        compare(model, truth, on_gpu(tokens=77), keep)


def test_left_padding_takes_the_masked_kernel():
    truth, model = lora_on_gpu(), lora_on_gpu(dtype=torch.bfloat16)
    truth.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    inputs = on_gpu(tokens=45)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :7] = 0
    inputs["attention_mask"], inputs["labels"] = mask, inputs["labels"].masked_fill(mask == 0, -100)
    inputs["labels"][0, 7] = -100
    assert any(h.startswith("efficient") for h in compare(model, truth, inputs))


def packed_on_gpu(lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor | int]:
    inputs = on_gpu(rows=1, tokens=sum(lengths), seed=seed)
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    inputs["labels"][0, starts[:-1].long()] = -100
    return {
        **inputs,
        "use_cache": False,  # with a cache the stock decoder takes a pack for one document
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("keep", [None, Keep(4, 50, True, 1)], ids=str)
@pytest.mark.parametrize("kernel", ["flash documents", "efficient documents"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_documents(family, kernel, keep, monkeypatch):
    if kernel == "efficient documents":
        monkeypatch.setattr("nbkit.models.attention.capability_of", lambda like: (7, 5))
    truth, model = lora_on_gpu(family), lora_on_gpu(family, torch.bfloat16)
    truth.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    how = compare(model, truth, packed_on_gpu([3, 61, 1, 40]), keep)
    assert any(h.startswith(kernel) for h in how)


@pytest.mark.parametrize("keep", [None, Keep(4, 50, True, 1)], ids=str)
def test_a_window_where_there_is_no_flash(keep, monkeypatch):
    monkeypatch.setattr("nbkit.models.attention.capability_of", lambda like: (7, 5))
    truth, model = lora_on_gpu("mistral"), lora_on_gpu("mistral", torch.float16)
    truth.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    how = compare(model, truth, on_gpu(tokens=77, padded=True), keep)
    assert any(h.startswith("efficient window") for h in how)


def test_recorded_packs_equal_eager_ones_and_take_other_lengths():
    import nbkit

    model = lora_on_gpu(dtype=torch.bfloat16)
    steps = [
        packed_on_gpu(lengths, seed) for seed, lengths in enumerate([[20, 44], [30, 34], [64], [9, 9, 9, 37], [1] * 8 + [56]])
    ]
    nbkit.patch(model, graphs=False)
    truth = [step(model, **one) for one in steps]
    nbkit.unpatch(model)
    nbkit.patch(model)
    graphs = vars(model.get_base_model())["_nbkit_graphs"]
    for _ in range(3):
        got = [step(model, **one) for one in steps]
    assert graphs.recorded, graphs.note
    for (loss, grads), (want, wanted) in zip(got, truth, strict=True):
        assert abs(loss - want) < 1e-3 and worst(grads, wanted)[0] < 2e-2
    nbkit.unpatch(model)


@pytest.mark.parametrize("shape", [(96, 128), (5, 5440), (1024, 4096), (3, 64)])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantisation_is_bit_equal_to_bitsandbytes(shape, nested, dtype):
    import bitsandbytes as bnb

    weight = torch.randn(shape, device="cuda", dtype=dtype)
    packed = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=nested).cuda()
    out = torch.full((shape[0], shape[1] + 16), float("nan"), device="cuda", dtype=dtype)
    dequantize_nf4(Nf4.of(packed), out)
    truth = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    assert torch.equal(out[:, : shape[1]], truth) and out[:, shape[1] :].isnan().all()


def test_a_step_launches_the_kernels_it_claims():
    from torch.profiler import ProfilerActivity, profile

    model = lora_on_gpu(dtype=torch.bfloat16, four_bit=True)
    binding = bound(model, Keep(0))  # no 16-bit copy
    inputs = on_gpu(tokens=64)
    for _ in range(2):
        step(model, **inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(model, **inputs)
        torch.cuda.synchronize()
    counts = {}
    for event in seen.events():
        counts[event.name] = counts.get(event.name, 0) + 1
    layers = 2
    # Two uses of seven weights a layer, less those of the last layer that the backward still finds in the scratch.
    assert counts["_dequantize_rows"] == layers * 7 * 2 - 7
    assert counts["_rotate_pack"] == layers and counts["_rotate_kernel"] == layers
    binding.release()


def test_recorded_steps_give_the_eager_gradients_and_follow_the_optimizer():
    import nbkit
    from nbkit.models.forwards import GRAPHS

    for four_bit in (False, True):
        eager, recorded = (lora_on_gpu(dtype=torch.bfloat16, four_bit=four_bit) for _ in range(2))
        nbkit.patch(eager, graphs=False)
        nbkit.patch(recorded)
        losses = []
        for model in (eager, recorded):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            seen = []
            for i in range(8):
                inputs = on_gpu(tokens=64, seed=i % 3)
                inputs["labels"][:, : 10 * (i % 3)] = -100
                loss = model(**inputs).loss
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seen += [loss.item(), norm.item()]
            losses.append(seen)
        assert vars(recorded.get_base_model())[GRAPHS].recorded, vars(recorded.get_base_model())[GRAPHS].note
        assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_recorded_steps_accumulate_switch_adapters_and_wait_for_their_backward():
    import nbkit
    from nbkit.models.forwards import GRAPHS

    model = lora_on_gpu(dtype=torch.bfloat16)
    nbkit.patch(model)
    one, two = on_gpu(tokens=64, seed=1), on_gpu(tokens=64, seed=2)
    for _ in range(3):
        a, b = step(model, **one), step(model, **two)
    assert vars(model.get_base_model())[GRAPHS].recorded
    first, second = model(**one).loss, model(**two).loss  # two replays before any backward
    (first + 2 * second).backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, a[1][n] + 2 * b[1][n], rtol=1e-3, atol=1e-6), n
    with pytest.raises(RuntimeError, match="carry no gradient"):
        model(**one).logits.sum().backward()
    model.zero_grad()
    with model.disable_adapter(), torch.no_grad():
        off = model(**one).loss.item()
    assert step(model, **one)[0] == pytest.approx(a[0], rel=1e-3) and off != pytest.approx(a[0], rel=1e-5)
    nbkit.unpatch(model)
    assert step(model, **one)[0] == pytest.approx(a[0], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["as chosen", "efficient"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_documents_do_not_leak(family, kernel, dtype, monkeypatch):
    """Another document 1 leaves the logits of document 2 the same bit for bit, from the first batch of a shape on."""
    if kernel == "efficient":
        monkeypatch.setattr("nbkit.models.attention.capability_of", lambda like: (7, 5))
    model = lora_on_gpu(family, dtype)
    binding = bound(model)
    for _ in range(2):
        inputs = packed_on_gpu([61, 40, 27])
        found = []
        for shift in (0, 7):
            inputs["input_ids"][0, :61] = (inputs["input_ids"][0, :61] + shift) % 300
            found.append(model(**inputs).logits[0].detach().clone())
        assert binding.how and not torch.equal(found[0][:61], found[1][:61])
        assert torch.equal(found[0][61:], found[1][61:])
    binding.release()


def test_recorded_packs_do_not_leak():
    import nbkit

    model = lora_on_gpu(dtype=torch.bfloat16)
    nbkit.patch(model)
    inputs, found = packed_on_gpu([24, 40]), []
    for number in range(8):
        inputs["input_ids"][0, :24] = (inputs["input_ids"][0, :24] + number) % 300
        outputs = model(**inputs)
        found.append(outputs.logits[0].detach().clone())
        outputs.loss.backward()
    graphs = vars(model.get_base_model())["_nbkit_graphs"]
    assert graphs.recorded, graphs.note
    for one in found[4:]:  # replays of one graph
        assert torch.equal(one[24:], found[-1][24:])
    assert not torch.equal(found[4][:24], found[-1][:24])
    nbkit.unpatch(model)
