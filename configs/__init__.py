"""Config files: `get_config()` of each returns the settings of a run.

They import nothing from here, as a wheel has them as files in `lazyattn/configs/`.
"""
