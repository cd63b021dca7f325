"""The files of a corpus on storage: listing them, reading them in tables of bounded size, and reading ahead."""
