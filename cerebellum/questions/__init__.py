"""Question benchmarks: where questions come from, how they are asked, what the answers say. No stage."""
