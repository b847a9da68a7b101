// A response whose body tells when it moves: onChunk with every piece, onEnd once, however it ends.
export function watched(response, { onChunk = () => {}, onEnd = () => {} }) {
  if (!response.body) {
    onEnd();
    return new Response(null, response);
  }
  const reader = response.body.getReader();
  const body = new ReadableStream({
    async pull(controller) {
      try {
        const { done, value } = await reader.read();
        if (done) {
          onEnd();
          controller.close();
        } else {
          onChunk();
          controller.enqueue(value);
        }
      } catch (error) {
        onEnd();
        controller.error(error);
      }
    },
    cancel(reason) {
      onEnd();
      return reader.cancel(reason);
    },
  });
  return new Response(body, response); // init: its status and its headers
}
