"""Ask a running server and print the answer as it comes. Usage: python stream.py [QUESTION], beside `fluent serve`"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    with OpenAI(base_url=URL, api_key=os.environ.get("FLUENT_SERVER__API_KEY", "none")) as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=200, stream=True
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
