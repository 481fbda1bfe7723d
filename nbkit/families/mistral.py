"""Mistral 7B, NeMo, Small (2409) and Zephyr. As Llama, with one sliding window for all layers where the config sets it.

NeMo's heads are 128 wide though hidden / heads is 160: q_proj gives 4096 of 5120, and o_proj takes 4096.
"""

from nbkit.families._family import MISTRAL, ZEPHYR, Attention, Checkpoint, Dims, Family

APACHE = "Apache-2.0"

FAMILY = Family(
    name="mistral",
    title="Mistral",
    model_types=("mistral",),
    attention=Attention(window="all"),
    tiny={"head_dim": 16, "sliding_window": 8},
    checkpoints=(
        Checkpoint("mistralai/Mistral-7B-Instruct-v0.3", Dims(4096, 32, 32, 8, 14336, 32768), 32768, MISTRAL, APACHE),
        Checkpoint("HuggingFaceH4/zephyr-7b-beta", Dims(4096, 32, 32, 8, 14336, 32000), 32768, ZEPHYR, "MIT", window=4096),
        Checkpoint("mistralai/Mistral-Nemo-Instruct-2407", Dims(5120, 40, 32, 8, 14336, 131072, 128), 131072, MISTRAL, APACHE),
        Checkpoint(
            "mistralai/Mistral-Small-Instruct-2409", Dims(6144, 56, 48, 8, 16384, 32768, 128), 32768, MISTRAL, "Mistral Research"
        ),
    ),
)
