"""The parts behind ``gpu_manager``: scheduling, memory, devices, engines and the web page.

Modules here do not import the modules at the project's root. Importing them configures no logging, imports no torch
and uses no GPU.
"""
