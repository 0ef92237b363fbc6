"""Data sources, one a file, found by `config.data.name`. Each has `Config(DataConfig)`, `build(config) -> Source`."""
