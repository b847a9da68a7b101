// 25 * (4 + 10) without eval. Throws an Error that says where it no longer understands.
export function calculate(expression: string): number {
  const tokens = expression.match(/\d+\.?\d*|\.\d+|\S/g) ?? [];
  let next = 0;

  const sum = (): number => {
    let value = product();
    while (tokens[next] === '+' || tokens[next] === '-') value += tokens[next++] === '+' ? product() : -product();
    return value;
  };
  const product = (): number => {
    let value = factor();
    while (tokens[next] === '*' || tokens[next] === '/') value *= tokens[next++] === '*' ? factor() : 1 / factor();
    return value;
  };
  const factor = (): number => {
    const token = tokens[next++];
    if (token === '-') return -factor();
    if (token === '(') {
      const value = sum();
      if (tokens[next++] !== ')') throw new Error(`a ) is missing in ${expression}`);
      return value;
    }
    if (!token || Number.isNaN(Number(token))) throw new Error(`${token ?? 'the end'} where a number belongs`);
    return Number(token);
  };

  const value = sum();
  if (next < tokens.length) throw new Error(`${tokens[next]} where an operator belongs`);
  return value;
}
