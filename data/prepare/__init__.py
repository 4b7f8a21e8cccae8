"""Data sets as their owners distribute them become LLaVA conversation files: `python -m data.prepare --help`."""
