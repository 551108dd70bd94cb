"""The console script ``lightning-async-localsgd``. Nothing else of the package imports it."""
