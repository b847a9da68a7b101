// What went wrong, and the way on.
export function Trouble({ error, onRetry }: { error: Error | undefined; onRetry: () => void }) {
  if (!error) return null;
  const isGone = /failed to fetch|network error|load failed/i.test(error.message); // browsers have words of their own
  return (
    <div className="trouble" role="alert">
      <p>{isGone ? 'The answer broke off.' : error.message}</p>
      <button type="button" onClick={onRetry}>
        Try again
      </button>
    </div>
  );
}
