"""A plugin that fails to import: Lethe lists it with its error, and nothing else breaks."""

raise RuntimeError("this plugin is broken on purpose")
