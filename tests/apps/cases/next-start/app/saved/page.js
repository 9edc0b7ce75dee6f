export default async function Saved({ searchParams }) {
  return <p>saved: {(await searchParams).word}</p>;
}
