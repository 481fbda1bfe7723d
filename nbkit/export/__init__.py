"""What was trained, written for others to load: one destination a file, one signature, everything read back and compared."""

from nbkit.export.adapter import export_adapter
from nbkit.export.gguf import export_gguf
from nbkit.export.merge import export_merged
from nbkit.export.report import ExportReport

__all__ = ["ExportReport", "export_adapter", "export_gguf", "export_merged"]
