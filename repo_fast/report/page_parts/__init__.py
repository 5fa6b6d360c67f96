"""The parts of the HTML pages, of an evaluation and of a run: what is said, drawn and embedded, and their assets."""
