def get_supported_edit_types():
    return {"clone": [], "speed": ["faster", "slower"], "paralinguistic": []}
