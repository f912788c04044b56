"""Other programs' training files, translated to a config.json, a dataset json and a lycoris json."""
