"""Llama 2, 3, 3.1, 3.2 and 3.3, and what shares their class: CodeLlama, TinyLlama, SmolLM2.

The base case: pre-norm RMSNorm, rotary positions by halves, SwiGLU, no biases unless the config asks for them.
3.1 and later stretch rope (type "llama3"); 3.2 and SmolLM2 tie the head to the embeddings.
"""

from nbkit.families._family import CHATML, LLAMA2, LLAMA3, ZEPHYR, Attention, Checkpoint, Dims, Family, Mlp

APACHE = "Apache-2.0"
L2 = "Llama 2 Community"
L3 = "Llama 3 Community"
L31 = "Llama 3.1 Community"
L32 = "Llama 3.2 Community"
D7 = Dims(4096, 32, 32, 32, 11008, 32000)
D13 = Dims(5120, 40, 40, 40, 13824, 32000)
D8 = Dims(4096, 32, 32, 8, 14336, 128256)
D70 = Dims(8192, 80, 64, 8, 28672, 128256)

FAMILY = Family(
    name="llama",
    title="Llama",
    model_types=("llama",),
    attention=Attention(bias_key="attention_bias"),
    mlp=Mlp(bias_key="mlp_bias"),
    tiny={
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    checkpoints=(
        Checkpoint(
            "smollm2-135m-instruct",
            Dims(576, 30, 9, 3, 1536, 49152),
            8192,
            CHATML,
            APACHE,
            tied=True,
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Checkpoint("HuggingFaceTB/SmolLM2-360M-Instruct", Dims(960, 32, 15, 5, 2560, 49152), 8192, CHATML, APACHE, tied=True),
        Checkpoint("HuggingFaceTB/SmolLM2-1.7B-Instruct", Dims(2048, 24, 32, 32, 8192, 49152), 8192, CHATML, APACHE, tied=True),
        Checkpoint("TinyLlama/TinyLlama-1.1B-Chat-v1.0", Dims(2048, 22, 32, 4, 5632, 32000), 2048, ZEPHYR, APACHE),
        Checkpoint("meta-llama/Llama-2-7b-chat-hf", D7, 4096, LLAMA2, L2),
        Checkpoint("meta-llama/Llama-2-13b-chat-hf", D13, 4096, LLAMA2, L2),
        Checkpoint("meta-llama/Llama-2-70b-chat-hf", Dims(8192, 80, 64, 8, 28672, 32000), 4096, LLAMA2, L2),
        Checkpoint("codellama/CodeLlama-7b-Instruct-hf", D7._replace(vocab=32016), 16384, LLAMA2, L2),
        Checkpoint("codellama/CodeLlama-13b-Instruct-hf", D13._replace(vocab=32016), 16384, LLAMA2, L2),
        Checkpoint("codellama/CodeLlama-34b-Instruct-hf", Dims(8192, 48, 64, 8, 22016, 32000), 16384, LLAMA2, L2),
        Checkpoint("meta-llama/Meta-Llama-3-8B-Instruct", D8, 8192, LLAMA3, L3),
        Checkpoint("meta-llama/Meta-Llama-3-70B-Instruct", D70, 8192, LLAMA3, L3),
        Checkpoint("meta-llama/Llama-3.1-8B-Instruct", D8, 131072, LLAMA3, L31),
        Checkpoint("meta-llama/Llama-3.1-70B-Instruct", D70, 131072, LLAMA3, L31),
        Checkpoint("meta-llama/Llama-3.1-405B-Instruct", Dims(16384, 126, 128, 8, 53248, 128256), 131072, LLAMA3, L31),
        Checkpoint("meta-llama/Llama-3.2-1B-Instruct", Dims(2048, 16, 32, 8, 8192, 128256), 131072, LLAMA3, L32, tied=True),
        Checkpoint("meta-llama/Llama-3.2-3B-Instruct", Dims(3072, 28, 24, 8, 8192, 128256), 131072, LLAMA3, L32, tied=True),
        Checkpoint("meta-llama/Llama-3.3-70B-Instruct", D70, 131072, LLAMA3, "Llama 3.3 Community"),
    ),
)
