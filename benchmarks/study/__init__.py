"""The study of docs/study.md: asynchronous and synchronous local SGD on real text, on a simulated cluster."""
