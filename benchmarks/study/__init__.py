"""The study in docs/study.md: asynchronous against synchronous local SGD on real text, on a simulated cluster."""
