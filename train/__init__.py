"""From text to adapter: settings, batches, the optimizer, the loop, the log."""
