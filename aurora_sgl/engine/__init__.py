"""All that runs inside SGLang's processes, and the only room that imports sglang."""
