"""What Cerebellum needs of an engine that runs models, without knowing llama.cpp."""
