"""The parts of the HTML report: `wording` (what is said), `charts`, `responses` (what is embedded), and its assets."""
