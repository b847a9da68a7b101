// What went wrong, and the way on.
export function Trouble({ error, onRetry }: { error: Error | undefined; onRetry: () => void }) {
  if (!error) return null;
  const isAppGone = /failed to fetch|network error|load failed/i.test(error.message);
  return (
    <div className="trouble" role="alert">
      <p>{isAppGone ? 'The answer broke off: a server is gone.' : error.message}</p>
      <button type="button" onClick={onRetry}>
        Try again
      </button>
    </div>
  );
}
