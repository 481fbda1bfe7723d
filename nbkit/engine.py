"""`Session`: the one door to loading, adapting, data, training, chat and export.

Panels, notebooks and `python -m nbkit run` all go through it. It holds state and order; the work is done
in the rooms below, which are imported only when they are needed, so that a panel shows within a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbkit.config import ALL_LINEAR, DataConfig, DataRecipe, ExportConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from nbkit.errors import ConfigError, DataError, ExportError, ModelError, TrainingError
from nbkit.evaluation import Answer, Evaluation
from nbkit.workspace import cache_folder, default_workspace, keep_rows, new_run_dir

if TYPE_CHECKING:
    from nbkit.chat.conversation import TextStream
    from nbkit.data.report import DataReport
    from nbkit.export import ExportReport
    from nbkit.hardware.fit import CatalogEntry
    from nbkit.inspection import Inspection
    from nbkit.models.load import LoadedModel
    from nbkit.models.patch import PatchReport
    from nbkit.training.runner import Run

Rows = str | Path | Iterable[Mapping[str, Any]]
HeldOut = Rows | int | float | None
Told = Callable[[str, int, int | None], None] | None


class Session:
    """One model, its adapter, its data and its latest run.

    Args:
        workspace: folder for runs, kept rows and exports. None: Google Drive or `/kaggle/working` where
            there is one, else `nbkit-workspace` in the current folder. It is made when first needed.

    Errors of every method are `NbkitError`s: one sentence saying what is wrong, where, and what to do.
    """

    def __init__(self, workspace: str | Path | None = None) -> None:
        self.workspace = Path(workspace) if workspace is not None else default_workspace()
        self.model: Any = None  # a transformers model, wrapped by PEFT after add_lora
        self.tokenizer: Any = None
        self.loaded: LoadedModel | None = None
        self.lora: LoraConfig | None = None
        self.patched: PatchReport | None = None
        self.data: DataReport | None = None
        self.run: Run | None = None
        self._model_config: ModelConfig | None = None
        self._data_config: DataConfig | None = None
        self._listeners: list[Callable[[str], None]] = []

    # -- state that panels follow ------------------------------------------------------------------

    def subscribe(self, callback: Callable[[str], None]) -> None:
        """Call `callback(topic)` after a change; topics are "model", "lora", "data" and "run"."""
        self._listeners.append(callback)

    @property
    def model_config(self) -> ModelConfig | None:
        """How the model was loaded; None before."""
        return self._model_config

    @property
    def data_config(self) -> DataConfig | None:
        """Where the data came from and how they were read, as a run keeps it; None before."""
        return self._data_config

    def _changed(self, topic: str) -> None:
        for callback in list(self._listeners):
            callback(topic)

    def _require_idle(self, action: str) -> None:
        if self.run is not None and self.run.status in ("running", "stopping"):
            raise TrainingError(f"A run is training in {self.run.dir}; wait for it or stop it before you {action}.")

    def _require_quiet(self, action: str) -> None:
        """As `_require_idle`, and no reply may be in the writing: it reads the weights that `action` changes or saves."""
        self._require_idle(action)
        if self.model is None:
            return
        from nbkit.chat.conversation import is_answering

        if is_answering(self.model):
            raise ModelError(f"The model is writing a reply; let it finish, or stop it, before you {action}.")

    def _require_model(self, action: str) -> None:
        if self.model is None:
            raise ModelError(f'No model is loaded; call session.load("smollm2-135m-instruct") before you {action}.')

    # -- model -------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        load_in_4bit: bool = False,
        dtype: str = "auto",
        max_seq_length: int = 2048,
        revision: str | None = None,
        token: str | None = None,
        progress: bool = True,
        rope_scaling: str = "auto",
    ) -> LoadedModel:
        """Load a checkpoint: `smollm2-135m-instruct`, any hub id, or a local folder.

        Args:
            dtype: "auto" is bfloat16 on GPUs of capability 8.0 or more, float16 below, float32 on CPU.
            max_seq_length: longest training row, in tokens. Beyond the model's positions its rope is stretched to it.
            rope_scaling: "none" refuses such rows instead.
            token: for gated checkpoints; it is passed on to the hub and stored nowhere.
        Raises: ModelError.
        """
        from nbkit.models.load import load

        self._require_quiet("load another model")
        config = ModelConfig(
            name=name,
            revision=revision,
            load_in_4bit=load_in_4bit,
            dtype=dtype,
            max_seq_length=max_seq_length,
            rope_scaling=rope_scaling,
        )
        self.unload()
        self.loaded = load(config, token=token, progress=progress)
        self.model, self.tokenizer, self._model_config = self.loaded.model, self.loaded.tokenizer, config
        self._changed("model")
        return self.loaded

    def unload(self) -> None:
        """Forget the model, the adapter and the prepared data, and give their memory back."""
        self._require_quiet("unload the model")
        had = self.model is not None
        self.model = self.tokenizer = self.loaded = self.lora = self.patched = self.data = self.run = None
        self._model_config = self._data_config = None
        if had:
            from nbkit.hardware.meter import release_memory

            release_memory()
            self._changed("model")

    def add_lora(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: Sequence[str] = ALL_LINEAR,
        bias: str = "none",
        use_rslora: bool = False,
        seed: int = 3407,
    ) -> Any:
        """Put fresh LoRA adapters on the model and bind nbkit's engine to it. Returns the PEFT model.

        Args:
            alpha: None is alpha = rank, scale 1.
            targets: names of linear modules; each must match at least one.
        Raises: ConfigError (rank 0 …), ModelError (no model, a target that matches nothing).
        """
        self._require_quiet("change the adapter")
        lora = LoraConfig(
            rank=rank, alpha=alpha, dropout=dropout, targets=tuple(targets), bias=bias, use_rslora=use_rslora, seed=seed
        )
        self._require_model("add LoRA")
        from nbkit.models.adapters import add_lora
        from nbkit.models.patch import patch

        self.model = add_lora(self.model, lora)
        self.patched = patch(self.model)
        self.lora = lora
        self._changed("lora")
        return self.model

    def catalog(self, load_in_4bit: bool | None = None) -> list[CatalogEntry]:
        """The checkpoints nbkit knows, each with the bytes a small LoRA run needs and whether it fits here.

        Args:
            load_in_4bit: None decides for each by this machine: 4-bit on a GPU, 16 or 32 bit on CPU.
        """
        from nbkit.hardware.fit import catalog

        return catalog(load_in_4bit=load_in_4bit)

    def lora_size(self, name: str | None = None, rank: int = 16, targets: Sequence[str] = ALL_LINEAR) -> tuple[int, int, int]:
        """(trainable parameters, parameters of the model, adapter bytes on disk) without building anything.

        Args:
            name: a checkpoint of the catalog; None is the loaded model.
        """
        from nbkit.hardware.shapes import known_shape

        if name is None:
            self._require_model("ask for the size of its adapter")
            shape = self.loaded.shape  # type: ignore[union-attr]
        else:
            shape = known_shape(name)
        lora = LoraConfig(rank=rank, targets=tuple(targets))
        return shape.lora_parameters(lora.rank, lora.targets), shape.parameters, shape.adapter_bytes(lora.rank, lora.targets)

    # -- data --------------------------------------------------------------------------------------

    def use_data(self, source: Rows, recipe: DataRecipe | None = None, held_out: HeldOut = None, seed: int = 3407) -> DataReport:
        """Read rows, find their format, render them with the model's chat template and label the replies.

        Args:
            source: a file, folder, hub set (`org/name:config#train[:99]`), https address, sample or rows in memory; docs/data.md.
            recipe: how columns become messages; None detects it.
            held_out: rows never trained on, for the loss before and after: another source, a number of rows, a share below 1.
        Raises: DataError, with row numbers.
        """
        return self.take_data(*self.read_data(source, recipe, held_out, seed))

    def read_data(
        self, source: Rows, recipe: DataRecipe | None = None, held_out: HeldOut = None, seed: int = 3407, progress: Told = None
    ) -> tuple[DataReport, DataConfig]:
        """What `use_data` reads, without using it yet: panels read on another thread, and then `take_data`. `progress` is
        told (what is done, rows done, rows in all or None); what it raises ends the reading."""
        self._require_idle("change the data")
        self._require_model("map data")
        from nbkit.data.pipeline import prepare
        from nbkit.data.progress import told_to

        recipe = recipe or DataRecipe()
        assert self._model_config is not None
        with told_to(progress):
            length, where = self._model_config.max_seq_length, cache_folder(self.workspace)
            report = prepare(source, self.tokenizer, recipe, max_seq_length=length, held_out=held_out, seed=seed, cache=where)
        # Rows that came from memory are kept as a file, so that the RunConfig alone can run again.
        return report, DataConfig(
            source=keep_rows(source, self.workspace),
            recipe=report.recipe,
            held_out=held_out if held_out is None or isinstance(held_out, (int, float)) else keep_rows(held_out, self.workspace),
            seed=seed,
            fingerprint=report.fingerprint,
        )

    def take_data(self, report: DataReport, config: DataConfig) -> DataReport:
        """Train on what `read_data` gave from now on. A template of the recipe becomes the tokenizer's, for chat and exports."""
        self._require_idle("change the data")
        from nbkit.data.templates import adopt

        adopt(self.tokenizer, report.recipe.template)
        self.data, self._data_config = report, config
        self._changed("data")
        return report

    def inspect(self, row: int | None = None, batch: int = 0, train: TrainConfig | None = None) -> Inspection:
        """A batch as training with `train` will see it, token by token, and the problems of the set; see `nbkit.inspect`."""
        from nbkit.inspection import inspect

        return inspect(self, row=row, batch=batch, train=train)

    # -- training ----------------------------------------------------------------------------------

    def run_config(self, train: TrainConfig | None = None) -> RunConfig:
        """The whole truth of the run that `train(train)` would start, as one JSON-able object."""
        self._require_model("make a run")
        if self.lora is None:
            raise ConfigError("The model has no adapter yet; call session.add_lora(rank=16) first.")
        if self._data_config is None:
            raise DataError('There is no data yet; call session.use_data("sample:ships-log") or give your own file first.')
        assert self._model_config is not None
        return RunConfig(model=self._model_config, lora=self.lora, data=self._data_config, train=train or TrainConfig())

    def train(self, train: TrainConfig | None = None) -> Run:
        """Start training on a worker thread and return at once; `await run` in a notebook, `run.wait()` in a script.

        Raises: ConfigError, DataError or TrainingError before step 0; errors of the run itself are raised by
            `await run` and `run.wait()`.
        """
        return self._start(self.run_config(train))

    def _start(self, config: RunConfig, resume: bool = False) -> Run:
        from nbkit.training.runner import Run

        self._require_quiet("start another run")
        assert self.data is not None
        if config.run_dir is None:
            config = config.replace(run_dir=str(new_run_dir(self.workspace, config.model.name)))
        self.run = Run(config, self.model, self.tokenizer, self.data, resume=resume)
        self._changed("run")
        return self.run

    def execute(self, config: RunConfig, resume: bool = False, token: str | None = None) -> Run:
        """Load, adapt, map and start exactly what `config` says, as `python -m nbkit run` does.

        Args:
            resume: continue from the newest whole checkpoint in `config.run_dir`.
        Raises: DataError if the rows are no longer those of the config's fingerprint.
        """
        model, lora, data = config.model, config.lora, config.data
        rope = model.rope_scaling
        self.load(model.name, model.load_in_4bit, model.dtype, model.max_seq_length, model.revision, token, rope_scaling=rope)
        self.add_lora(lora.rank, lora.alpha, lora.dropout, lora.targets, lora.bias, lora.use_rslora, lora.seed)
        report = self.use_data(data.source, data.recipe, data.held_out, data.seed)
        if data.fingerprint not in (None, report.fingerprint):
            raise DataError(
                f"The rows of {data.source} are not those this run was made with; "
                "restore the file, or remove the key data.fingerprint from the run file to train on the new rows."
            )
        return self._start(config, resume)

    # -- what came of it ---------------------------------------------------------------------------

    def evaluate(self, adapter: bool = True, max_new_tokens: int = 64, limit: int | None = None) -> Evaluation:
        """Loss, greedy replies and the share of right fields on the held-out rows.

        Args:
            adapter: False measures the base model, with the adapter switched off.
            limit: only the first rows.
        """
        self._require_idle("evaluate")
        from contextlib import nullcontext

        from nbkit.chat.compare import answer_all, field_accuracy
        from nbkit.data.wanted import wanted
        from nbkit.training.evaluate import held_out_loss

        data = None if self.data is None else wanted(self.data)  # of KTO, the rows whose label is true
        if data is None or not data.held_out_rows:
            raise DataError("There are no held-out rows; call session.use_data(source, held_out=30) or name a second source.")
        rows, examples = list(data.held_out_rows)[:limit], list(data.held_out_examples)[:limit]
        off = not adapter and self.lora is not None
        with self.model.disable_adapter() if off else nullcontext():
            loss = held_out_loss(self.model, examples, self.tokenizer.pad_token_id)
        prompts = [row[:-1] for row in rows]
        replies = answer_all(self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, use_adapter=adapter)
        answers = tuple(
            Answer(row[-2]["content"], row[-1]["content"], reply, *field_accuracy(reply, row[-1]["content"]))
            for row, reply in zip(rows, replies, strict=True)
        )
        return Evaluation(loss=loss, answers=answers)

    def chat(
        self,
        prompt: str,
        history: Sequence[Mapping[str, str]] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        adapter: bool = True,
        seed: int | None = None,
    ) -> TextStream:
        """A streaming reply: iterate over it, or read `.text` for the whole.

        Args:
            history: earlier messages, each {"role": …, "content": …}.
            temperature: 0 is greedy.
            adapter: False asks the base model.
        """
        self._require_idle("chat")
        self._require_model("chat")
        from nbkit.chat.conversation import stream

        recipe = self.data.recipe if self.data is not None else None
        system = recipe.system if recipe is not None else None
        messages = [*(dict(m) for m in history or ()), {"role": "user", "content": prompt}]
        return stream(
            self.model,
            self.tokenizer,
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            use_adapter=adapter,
            seed=seed,
            system=system,
        )

    def export(self, kind: str, path: str | Path | None = None, quantization: str | None = None) -> ExportReport:
        """Write the adapter, the merged 16-bit model or a GGUF file, read it back and compare.

        Args:
            kind: "adapter", "merged_16bit" or "gguf".
            path: None is a name in the run folder.
            quantization: for gguf: "f16" or "q8_0".
        Raises: ExportError; nothing half-written is left.
        """
        from nbkit import export as room

        config = ExportConfig(kind=kind, path=None if path is None else str(path), quantization=quantization)
        self._require_quiet("export")
        if self.lora is None or self.loaded is None:
            raise ExportError("There is no adapter to export; load a model, add LoRA and train first.")
        writers = {"adapter": room.export_adapter, "merged_16bit": room.export_merged, "gguf": room.export_gguf}
        return writers[kind](
            self.model,
            self.tokenizer,
            Path(config.path) if config.path else self._export_path(config),
            quantization=config.quantization,
            source_folder=self.loaded.folder,
        )

    def _export_path(self, config: ExportConfig) -> Path:
        if self.run is not None:
            folder = Path(self.run.dir) / "exports"
        else:
            folder = self.workspace / "exports" / time.strftime("%Y%m%d-%H%M%S")
        return folder / (f"model-{config.quantization}.gguf" if config.kind == "gguf" else config.kind)
