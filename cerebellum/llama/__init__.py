"""The only place that knows llama.cpp: the engine, its fake, quantization and activations.

Nothing outside this folder touches ctypes. ``engine.py`` says what an engine is, ``native.py`` is
llama.cpp itself, ``fake.py`` is the engine for tests and dry thinking.
"""
