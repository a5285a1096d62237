"""What a run tells about itself: metrics, progress, speed, memory, stalls, profiles. Nothing here knows a model or a config object."""

from maskae.monitor.clock import Clock, format_seconds
from maskae.monitor.device_info import describe_run, device_memory, machine_columns, mfu, mfu_text, peak_flops
from maskae.monitor.late_metrics import LateMetrics
from maskae.monitor.profiler import Profiler
from maskae.monitor.progress import Progress
from maskae.monitor.tables import CsvWriter, JsonlWriter, curves, is_machine_column, read_metrics
from maskae.monitor.watchdog import Watchdog
from maskae.monitor.writers import MultiWriter, PngWriter, TensorBoardWriter, WandbWriter, Writer, open_writers

__all__ = [
    "Clock",
    "CsvWriter",
    "JsonlWriter",
    "LateMetrics",
    "MultiWriter",
    "PngWriter",
    "Profiler",
    "Progress",
    "TensorBoardWriter",
    "WandbWriter",
    "Watchdog",
    "Writer",
    "curves",
    "describe_run",
    "device_memory",
    "format_seconds",
    "is_machine_column",
    "machine_columns",
    "mfu",
    "mfu_text",
    "open_writers",
    "peak_flops",
    "read_metrics",
]
