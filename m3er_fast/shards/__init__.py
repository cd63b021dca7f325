"""The files of a corpus as they lie on storage: listed, read in tables of bounded size, and read ahead."""
