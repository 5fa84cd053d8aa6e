"""From a configuration file to frozen objects; the only place that knows keys."""
