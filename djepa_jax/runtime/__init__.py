"""The machine: processes, storage, locks, metrics, profiles. Knows no model."""
