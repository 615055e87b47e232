"""What composes coordinator and sites on one machine: backends, comparisons, scenarios, benchmarks."""
