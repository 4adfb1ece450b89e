"""The two command lines: `supsupd` runs the daemon, `supsup-cli` talks to it."""
