"""A run's events as one self-contained HTML page.

Reading order: events, series, html, charts, graph, results, setup, page.
"""

from peertune.report.page import write_report

__all__ = ["write_report"]
