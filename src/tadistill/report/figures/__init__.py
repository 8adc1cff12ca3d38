"""The figures of a report, as HTML elements. If the study has no data for a figure, its function returns None or an empty dict."""
