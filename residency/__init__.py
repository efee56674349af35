"""Replaceable parts behind ``gpu_manager``: devices, residents, probes, engines and the web page.

Nothing in this package imports the modules at the root of the project, and importing any of it
sets up no logging, imports no torch and touches no GPU.
"""
