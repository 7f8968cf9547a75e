"""A run's folder on disk: what it holds, its checkpoints, history and lock, and every reason to refuse a resume."""
