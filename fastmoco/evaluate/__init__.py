"""How good a representation is: kNN and linear probes on every stage, beside baselines without training.

The parts are imported from their modules: `run` (evaluate, collect_features and the command line), `protocol`
(evaluate_features), `features`, `baselines`, `splits`, `knn`, `probe`, `scores` (from `weighted` and `intervals`),
`delong` and `report`. Nothing is imported here: the probes' solver takes seconds to load, and pretraining needs only
the kNN monitor.
"""
