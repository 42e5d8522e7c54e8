"""The layer that knows torch and nothing of ours: configuration, dispatch, packing, devices, errors."""
