"""The figures of a report, as HTML elements. A function returns None or an empty dict if the study has no data for its figure."""
