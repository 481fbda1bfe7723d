"""`python -m nbkit`: run a RunConfig headless, look at the machine, fetch a checkpoint.

python -m nbkit run run.json [--resume]
python -m nbkit doctor
python -m nbkit fetch smollm2-135m-instruct
python -m nbkit certify smollm2-135m-instruct [--4bit] [--json certificate.json]
"""

from __future__ import annotations

import argparse
import os
import sys

from nbkit.errors import NbkitError


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 a fault told in one sentence, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="nbkit", description="Fine-tune LLMs: fast, exact, in a notebook or headless.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what a run.json says, with progress, and print the final figures")
    run.add_argument("file", help="a RunConfig written by RunConfig.to_json or found in a run folder")
    run.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint of the run folder")
    commands.add_parser("doctor", help="versions, device, memory, disk, and one sentence per problem")
    fetch = commands.add_parser("fetch", help="download a checkpoint into the cache, for work without a network")
    fetch.add_argument("name")
    certify = commands.add_parser("certify", help="measure here that the patched model is the stock one; exit 1 if not")
    certify.add_argument("name", help="a checkpoint or folder; LoRA of rank 16 is put on it")
    certify.add_argument("--4bit", dest="four_bit", action="store_true", help="load the weights in NF4")
    certify.add_argument("--json", help="write every comparison to this file")
    options = parser.parse_args(arguments)
    # Read when torch is loaded, which is later: waiting threads sleep, so that a run shares its cores with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if options.command == "run":
            return _run(options.file, options.resume)
        if options.command == "doctor":
            from nbkit.hardware.doctor import doctor

            print(doctor())
        elif options.command == "certify":
            return _certify(options.name, options.four_bit, options.json)
        else:
            from nbkit.models.load import fetch as fetch_checkpoint

            print(fetch_checkpoint(options.name))
    except NbkitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _run(file: str, resume: bool) -> int:
    from nbkit.config import RunConfig
    from nbkit.engine import Session

    config = RunConfig.from_json(file)
    session = Session()
    run = session.execute(config, resume=resume)
    print(session.loaded.message if session.loaded else "", session.data, f"run folder: {run.dir}", sep="\n")
    result = run.wait()
    exports = [session.export(e.kind, e.path, e.quantization) for e in config.exports] if not result.stopped else []
    print(_figures(result), *exports, sep="\n")
    return 130 if result.stopped else 0


def _certify(name: str, four_bit: bool, file: str | None) -> int:
    import nbkit
    from nbkit.engine import Session

    session = Session()
    session.load(name, load_in_4bit=four_bit)
    certificate = nbkit.certify(session.add_lora(rank=16))
    print(certificate)
    if file is not None:
        certificate.to_json(file)
    return 0 if certificate.passed else 1


def _figures(result) -> str:  # type: ignore[no-untyped-def]
    lines = [f"{'stopped' if result.stopped else 'finished'} at step {result.step} after {result.seconds:.0f} s"]
    if result.loss is not None:
        lines.append(f"training loss {result.loss:.4f}")
    if result.held_out_before is not None and result.held_out_after is not None:
        lines.append(f"held-out loss {result.held_out_before:.4f} -> {result.held_out_after:.4f}")
    lines.append(f"peak memory {result.peak_bytes / 1e9:.2f} GB")
    if result.adapter_path:
        lines.append(f"adapter: {result.adapter_path}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
