"""The page and the HTTP calls. The manager is seen only through `protocols.Manager`."""
