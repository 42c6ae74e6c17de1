"""Tasks: where examples come from. One file each; `base` says what a task is."""
