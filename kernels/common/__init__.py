"""What every kernel shares: environment, checks, backend choice, compiled libraries, Philox."""
