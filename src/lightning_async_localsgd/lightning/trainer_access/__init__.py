"""The only modules that use Lightning's private names.

Each private name is behind a function or a public name here, whose docstring says what Lightning does. A test for each
checks the description with a real Trainer, so a Lightning release that changes a name fails that test first.
"""
