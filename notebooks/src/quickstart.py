"""The source of notebooks/quickstart.ipynb; `python notebooks/build.py` makes the notebook from it."""

# %% [markdown]
# # Fine-tune a language model, here, now
#
# {{badges}}
#
# **Needs:** 2 CPU cores and 2 GB of free memory; a GPU is used if there is one · about 5 minutes · downloads 93 MB once.
#
# You will take SmolLM2, a real chat model with 135 million parameters, and teach it something it cannot do: turn a rambling
# report from the bridge into one terse line of a ship's log. You will see it fail before, learn in two minutes, and succeed after.
# Choose **Run → Run All Cells** and read along.

# %%
# {{install}}

# %% [markdown]
# ## 1. What is this machine?
#
# The doctor looks at versions, device, memory and disk, and says in one sentence each what would get in the way.

# %%
import nbkit

nbkit.doctor()

# %% [markdown]
# ## 2. A model
#
# A `Session` holds one model, its adapter, its data and its latest run. Everything the panels do goes through it, so that you can
# do the same from code. The model is fetched once and kept; any hub id or local folder would load through the same call.

# %%
session = nbkit.Session()
loaded = session.load("smollm2-135m-instruct", max_seq_length=512)

# %% [markdown]
# ## 3. A small adapter instead of the whole model
#
# LoRA leaves the model's own weights alone. Beside each linear layer it puts two thin matrices, and only those are trained:
# 2.4 million numbers here instead of 135 million, which is why it fits. `rank` is how thin: more rank can learn more, and costs more.

# %%
model = session.add_lora(rank=8)
print(session.patched)

# %% [markdown]
# ## 4. Examples to learn from
#
# The sample holds 200 reports, each with the log line it should become, and 30 more that are never trained on: they are the exam,
# told in other words and with other facts. Your own JSONL, JSON or CSV file works the same way; the format is detected.

# %%
session.use_data("sample:ships-log", held_out="sample:ships-log/held_out")

# %% [markdown]
# This is one example as the model sees it. Coloured tokens are the ones it is graded on: the reply, and the mark that ends it.
# The question is context, so it bears no loss.

# %%
from nbkit.widgets import DatasetMapper

DatasetMapper(session)

# %% [markdown]
# ## 5. Before
#
# What does the model make of such a report today? It answers the thirty reports of the exam. A field is one fact of the log line:
# the time, the wind, the sea, the speed, and what happened.

# %%
before = session.evaluate(adapter=False, max_new_tokens=48)
print(before)
print("\nReport:", before.answers[0].prompt, "\n\nSmolLM2:", before.answers[0].reply)

# %% [markdown]
# ## 6. Train
#
# A hundred of the two hundred reports, two in each step. The cell stays busy until training ends, and the plot moves meanwhile. **Stop**
# (or the kernel's ■) ends it at the next step and keeps what was learned. Where little memory is free, as on a small hosted machine,
# the two rows of a step are taken one after the other: the same arithmetic in less room.

# %%
from IPython.display import display

from nbkit.hardware.probe import probe
from nbkit.widgets import TrainPanel

rows_at_once = 2 if probe().free_bytes > 1.5e9 else 1
config = nbkit.TrainConfig(
    batch_size=rows_at_once,
    gradient_accumulation=2 // rows_at_once,
    max_steps=50,
    learning_rate=2e-3,
    seed=3407,
)
display(TrainPanel(session))
run = session.train(config)
result = await run

# %% [markdown]
# ## 7. After
#
# The same exam. The loss is how surprised the model is by the right answers; the fields are what a reader would check.

# %%
after = session.evaluate(max_new_tokens=48)
print("before:", before)
print("after: ", after)

# %% [markdown]
# Three reports from the exam, side by side:

# %%
from html import escape

from IPython.display import HTML

shown = [0, 10, 20]
rows = "".join(
    f"<tr style='text-align: left'><td>{escape(b.prompt)}</td><td>{escape(b.reply)}</td>"
    f"<td><b>{escape(a.reply)}</b></td><td>{escape(a.expected)}</td></tr>"
    for b, a in ((before.answers[i], after.answers[i]) for i in shown)
)
head = "<tr><th>report</th><th>before</th><th>after</th><th>what the log says</th></tr>"
HTML(f"<table style='text-align: left'>{head}{rows}</table>")

# %% [markdown]
# Now write your own report:

# %%
from nbkit.widgets import ChatPanel

chat = ChatPanel(session)
display(chat)
chat.set(
    prompt="Log this report.\n\nA loud evening. The radio failed at 18:40 and we make 6 knots. Wind is west 5, sea is rough.",
    max_new_tokens=48,
)
chat.click("send")
await chat.finished()

# %% [markdown]
# ## 8. Take it with you
#
# - the **adapter**: a few megabytes, loads onto the same model with PEFT;
# - the **merged model**: a transformers folder that anything can load; it is re-read from disk and compared with what was trained;
# - **GGUF** files for llama.cpp, Ollama and LM Studio: 16-bit, and 8-bit at half the size.

# %%
adapter = session.export("adapter")
merged = session.export("merged_16bit")
gguf = [session.export("gguf", quantization=kind) for kind in ("f16", "q8_0")]
for report in (adapter, merged, *gguf):
    print(report)

# %% [markdown]
# ## What happened, in figures
#
# Kept in the workspace too. The whole run can be repeated without a notebook: `python -m nbkit run run.json`.

# %%
import json

summary = {
    "rows": len(after.answers),
    "loss_before": before.loss,
    "loss_after": after.loss,
    "fields": after.fields,
    "fields_right_before": before.fields_right,
    "fields_right_after": after.fields_right,
    "answers": [
        {"prompt": before.answers[i].prompt, "before": before.answers[i].reply, "after": after.answers[i].reply} for i in shown
    ],
    "adapter": str(adapter.path),
    "merged": str(merged.path),
    "gguf": [str(report.path) for report in gguf],
    "train_seconds": result.seconds,
    "peak_bytes": result.peak_bytes,
    "steps": result.step,
}
(session.workspace / "quickstart.json").write_text(json.dumps(summary, indent=2))
print(f"held-out loss {before.loss:.3f} -> {after.loss:.3f}")
print(f"fields right  {before.fields_right} -> {after.fields_right} of {after.fields}")

# %% [markdown]
# **Next:** give `session.use_data` your own file, or type `nbkit.studio()` in a new cell to do all of this with the mouse.
