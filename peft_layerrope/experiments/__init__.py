"""The paper's experiments: functions from a `Measuring`, a task and an adapter's config to a `Section`.

The model is left as it was found, and an adapter is judged on contexts of the test split. What does not apply raises a
LayerRopeError: a TaskError for a task without the gold positions or contexts that are needed, an AdapterMismatchError
for an adapter with another number of layers, a SearchError for factors or a curve that cannot be.
"""
