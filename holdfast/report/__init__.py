"""What a person looks at: the report page, and tables for the terminal."""

from holdfast.report.page import write_comparison, write_report, write_stability
from holdfast.report.stability import stability_tables
from holdfast.report.tables import comparison_table, summary_table

__all__ = [
    "comparison_table",
    "stability_tables",
    "summary_table",
    "write_comparison",
    "write_report",
    "write_stability",
]
