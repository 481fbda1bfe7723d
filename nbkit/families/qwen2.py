"""Qwen2 and Qwen2.5: as Llama, with a bias on q, k and v and none on o, and a window on some layers where the config asks."""

from nbkit.families._family import CHATML, Attention, Checkpoint, Dims, Family

APACHE = "Apache-2.0"
D05 = Dims(896, 24, 14, 2, 4864, 151936)
D15 = Dims(1536, 28, 12, 2, 8960, 151936)
D7 = Dims(3584, 28, 28, 4, 18944, 152064)
D72 = Dims(8192, 80, 64, 8, 29568, 152064)

FAMILY = Family(
    name="qwen2",
    title="Qwen2",
    model_types=("qwen2",),
    attention=Attention(qkv_bias=True, window="layer_types"),
    tiny={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    checkpoints=(
        Checkpoint("Qwen/Qwen2.5-0.5B-Instruct", D05, 32768, CHATML, APACHE, tied=True),
        Checkpoint("Qwen/Qwen2.5-1.5B-Instruct", D15, 32768, CHATML, APACHE, tied=True),
        Checkpoint("Qwen/Qwen2.5-3B-Instruct", Dims(2048, 36, 16, 2, 11008, 151936), 32768, CHATML, "Qwen Research", tied=True),
        Checkpoint("Qwen/Qwen2.5-7B-Instruct", D7, 32768, CHATML, APACHE),
        Checkpoint("Qwen/Qwen2.5-14B-Instruct", Dims(5120, 48, 40, 8, 13824, 152064), 32768, CHATML, APACHE),
        Checkpoint("Qwen/Qwen2.5-32B-Instruct", Dims(5120, 64, 40, 8, 27648, 152064), 32768, CHATML, APACHE),
        Checkpoint("Qwen/Qwen2.5-72B-Instruct", D72, 32768, CHATML, "Qwen"),
        Checkpoint("Qwen/Qwen2-0.5B-Instruct", D05, 32768, CHATML, APACHE, tied=True),
        Checkpoint("Qwen/Qwen2-1.5B-Instruct", D15, 32768, CHATML, APACHE, tied=True),
        Checkpoint("Qwen/Qwen2-7B-Instruct", D7, 32768, CHATML, APACHE),
        Checkpoint("Qwen/Qwen2-72B-Instruct", D72, 32768, CHATML, "Tongyi Qianwen"),
    ),
)
