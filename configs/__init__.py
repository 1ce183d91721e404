"""Config files: `get_config()` of each returns the settings of a run."""
